from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitrine_vlm.vllm_connector.channel_path import make_private_folder, remove_folder, socket_path


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The socket's path in a folder that exists. pytest's own folders may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="vtr") as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        path = socket_path("engine/0")
        make_private_folder(path)
        yield path
        remove_folder(path)
