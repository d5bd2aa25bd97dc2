"""Writes the table of values in vitrine/README.md from the comments in vitrine/values.yaml.

A comment line that begins with `# --` describes the key below it, with all that is inside of that key.

    python helm/docs.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "vitrine"
_BEGIN, _END = "<!-- values: begin -->", "<!-- values: end -->"


def described(values_yaml: str) -> dict[str, str]:
    """Description of each key that has one, by its path ("llm.defaults.replicas"), in the file's order.

    Raises:
        ValueError: a description has no key below it.
    """
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    description = ""
    for number, line in enumerate(values_yaml.splitlines(), 1):
        if comment := re.match(r" *# -- (.+)", line):
            description = comment[1]
        elif key := re.match(r"( *)([\w.-]+):( |$)", line):
            indent = len(key[1])
            path = [(outer, name) for outer, name in path if outer < indent] + [(indent, key[2])]
            if description:
                found[".".join(name for _, name in path)] = description
            description = ""
        elif description:
            raise ValueError(f"values.yaml, line {number}: a key is expected below a description, not {line!r}")
    return found


def table(values_yaml: str) -> str:
    """One row for each described key, with its default."""
    values = yaml.safe_load(values_yaml)
    rows = ["| value | default | what |", "|---|---|---|"]
    for path, description in described(values_yaml).items():
        default: Any = values
        for name in path.split("."):
            default = default[name]
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {description} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of values in the chart's README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the table is out of date")
    check = parser.parse_args().check
    readme = CHART / "README.md"
    text = readme.read_text()
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    new = f"{before}{_BEGIN}\n{table((CHART / 'values.yaml').read_text())}\n{_END}{after}"
    if check and new != text:
        print(f"{readme} is out of date: run python helm/docs.py", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
