"""Writes the table of values in vitrine/README.md and the descriptions in vitrine/values.schema.json.

Both come from the comments in vitrine/values.yaml: a comment line that begins with `# --` describes the key below it,
with all that is inside of that key.

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


def with_descriptions(schema: dict[str, Any], values_yaml: str) -> dict[str, Any]:
    """The schema with the comments as descriptions. Where several keys have one definition, it has the texts of all."""
    schema = _without_descriptions(schema)
    texts: dict[int, dict[str, str]] = {}
    parts: dict[int, dict[str, Any]] = {}
    for path, description in described(values_yaml).items():
        part = schema
        for name in path.split("."):
            part = _resolved(part, schema)["properties"][name]
        parts[id(part)] = part
        texts.setdefault(id(part), {})[path] = description
    for key, part in parts.items():
        distinct = set(texts[key].values())
        lines = distinct if len(distinct) == 1 else [f"{path}: {text}" for path, text in texts[key].items()]
        rest = dict(part)
        part.clear()
        part |= {"description": "\n".join(lines), **rest}
    return schema


def _without_descriptions(part: Any, *, is_properties: bool = False) -> Any:
    if isinstance(part, list):
        return [_without_descriptions(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        name: _without_descriptions(value, is_properties=name in ("properties", "definitions") and not is_properties)
        for name, value in part.items()
        if is_properties or name != "description"
    }


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "properties" not in part:
        part = part["allOf"][0] if "allOf" in part else schema["definitions"][part["$ref"].split("/")[-1]]
    return part


def as_json(value: Any, indent: int = 0) -> str:
    """JSON in which what fits onto a line is on one."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or len(flat) + indent <= 110:
        return flat
    inner = "  " * (indent // 2 + 1)
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(name)}: {as_json(each, len(inner))}" for name, each in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + inner[2:] + "}"
    return "[\n" + ",\n".join(inner + as_json(each, len(inner)) for each in value) + "\n" + inner[2:] + "]"


def made() -> dict[Path, str]:
    """The files' texts as they should be."""
    values_yaml = (CHART / "values.yaml").read_text()
    readme, schema = CHART / "README.md", CHART / "values.schema.json"
    before, rest = readme.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    return {
        readme: f"{before}{_BEGIN}\n{table(values_yaml)}\n{_END}{after}",
        schema: as_json(with_descriptions(json.loads(schema.read_text()), values_yaml)) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of values and the schema's descriptions.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if one of them is out of date")
    check = parser.parse_args().check
    out_of_date = {file: text for file, text in made().items() if file.read_text() != text}
    for file, text in out_of_date.items():
        if check:
            print(f"{file} is out of date: run python helm/docs.py", file=sys.stderr)
        else:
            file.write_text(text)
    return 1 if check and out_of_date else 0


if __name__ == "__main__":
    sys.exit(main())
