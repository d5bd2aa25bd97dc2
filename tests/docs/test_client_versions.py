"""The clients that docs/api.md lists are those that the tests call."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"


def test_the_versions_are_those_that_are_installed() -> None:
    pinned = set(json.loads((CLIENTS / "node" / "package.json").read_text())["dependencies"].items())
    for path in CLIENTS.glob("requirements*.txt"):
        pinned |= {
            (name, version) for name, version in re.findall(r"^([\w-]+)==(\S+)$", path.read_text(), re.MULTILINE)
        }
    section = (ROOT / "docs" / "api.md").read_text().split("### Clients\n")[1]
    listed = re.findall(r"^\| `([^`]+)`.*? \| (\d\S*) \|", section, re.MULTILINE)
    assert len(listed) >= 8
    for name, version in listed:
        assert (name, version) in pinned
