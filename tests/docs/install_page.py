"""docs/install.md as blocks of commands by heading."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/install.md"


def blocks(heading: str) -> list[str]:
    """The blocks of commands below a heading, with continued lines joined."""
    [section] = re.findall(rf"(?ms)^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE.read_text())
    return [block.replace("\\\n", " ") for block in re.findall(r"(?ms)^```\n(.*?)^```", section)]


def commands(heading: str, program: str) -> list[list[str]]:
    """The words of every line below a heading that calls a program."""
    lines = [shlex.split(line) for block in blocks(heading) for line in block.splitlines() if line]
    return [words for words in lines if words[0] == program]
