"""Makes the schemas here from the operators' published CustomResourceDefinitions.

    python -m tests.helm.schemas.extract KIND CRD_FILE SOURCE > tests/helm/schemas/kind.yaml

Descriptions and rules of servers are left out, and so are pod templates, which Kubernetes' own schema checks. Every
object whose properties are listed takes no others, as servers drop unknown ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

_LEFT_OUT = {"description", "format", "default"}
# Of Kubernetes' own types, with thousands of lines.
_KUBERNETES = {"template", "service", "serveService", "headService", "initContainers", "affinity"}


def schema_of(definition: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the JSON schema of the definition's stored version."""
    (version,) = (each for each in definition["spec"]["versions"] if each["storage"])
    group, kind = definition["spec"]["group"], definition["spec"]["names"]["kind"]
    parts = _strict(version["schema"]["openAPIV3Schema"])["properties"]
    return {
        "$comment": source,
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": f"{group}/{version['name']}"},
            "kind": {"const": kind},
            "metadata": {"type": "object"},
            "spec": parts["spec"],
        },
    }


def _strict(part: Any) -> Any:
    if isinstance(part, list):
        return [_strict(each) for each in part]
    if not isinstance(part, dict):
        return part
    if part.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {name: value for name, value in part.items() if name not in _LEFT_OUT and not name.startswith("x-")}
    if "properties" in kept:
        kept["properties"] = {
            name: {"type": _strict(value).get("type", "object")} if name in _KUBERNETES else _strict(value)
            for name, value in part["properties"].items()
        }
        kept["additionalProperties"] = False
    if "items" in kept:
        kept["items"] = _strict(kept["items"])
    if isinstance(kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = _strict(kept["additionalProperties"])
    return kept


def main() -> None:
    _, kind, file, source = sys.argv
    definitions = [each for each in yaml.safe_load_all(Path(file).read_text()) if each]
    (definition,) = (each for each in definitions if each["spec"]["names"]["kind"] == kind)
    yaml.safe_dump(schema_of(definition, source), sys.stdout, sort_keys=False, width=120, default_flow_style=None)


if __name__ == "__main__":
    main()
