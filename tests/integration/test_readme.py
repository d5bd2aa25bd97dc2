"""The README's gRPC example as a user runs it: in a folder of its own, against a real worker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.integration.fleet import Fleet
from tests.integration.media import picture

README = Path(__file__).parents[2] / "README.md"


def test_the_grpc_example_prints_an_answer(small_fleet: Fleet, tmp_path: Path) -> None:
    [example] = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "grpc" in code]
    assert "127.0.0.1:50052" in example
    address = small_fleet.worker_processes["shm"].addresses["grpc"]
    (tmp_path / "example.py").write_text(example.replace("127.0.0.1:50052", address))
    (tmp_path / "photo.jpg").write_bytes(picture(77, 96, 64).data)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
