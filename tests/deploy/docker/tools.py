"""Programs that tests need and that not every machine has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def find_tool(name: str, source: str) -> str:
    """Path of the program, from this Python's environment or PATH; without it, the test is skipped."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; it comes with {source}")
    return path


def check(*command: str) -> None:
    """Fails the test with what the program prints if it does."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
