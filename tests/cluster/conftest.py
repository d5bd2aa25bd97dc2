"""Namespaces, which take root and an overlay file system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def pods_folder(tmp_path: Path) -> Path:
    """An empty folder for pods; skips the test where no container can be made."""
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    options = f"lowerdir=/,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, f"{tmp_path}/root"]
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", *mount], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no containers can be made here: {tried.stderr.strip()}")
    folder = tmp_path / "pods"
    folder.mkdir()
    return folder
