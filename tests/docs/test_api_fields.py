"""The tables of fields in docs/api.md are those of the worker's rules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="a source distribution has no docs")
def test_the_tables_are_up_to_date() -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "api_fields.py", "--check"], check=True)
