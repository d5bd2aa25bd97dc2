"""The compose files, as Compose reads them: extended services are merged, variables have their defaults."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.docker.dockerfile import FOLDER, environment, read_stages

FILES = sorted(file.name for file in FOLDER.glob("compose*.yaml"))
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def defaults(file: str) -> dict[str, str]:
    """Of the variables that a file names."""
    return dict(VARIABLE.findall((FOLDER / file).read_text()))


def filled_in(text: str) -> str:
    return VARIABLE.sub(lambda match: match[2] or "", text)


def compose(file: str) -> dict[str, Any]:
    """The file, in which services have what they extend: maps are merged, lists put one behind the other."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / file).read_text())
    for name, service in content["services"].items():
        if extended := service.pop("extends", None):
            base = compose(extended["file"])["services"][extended["service"]]
            content["services"][name] = _merged(base, service)
    return content


def services(file: str) -> dict[str, Any]:
    found: dict[str, Any] = compose(file)["services"]
    return found


def settings(file: str, service: str) -> dict[str, str]:
    """The service's VITRINE_* variables: of its image, then of the compose file."""
    definition = services(file)[service]
    own = {name: filled_in(value) for name, value in definition["environment"].items()}
    both = environment(read_stages(), definition["build"]["target"]) | own
    return {name: value for name, value in both.items() if name.startswith("VITRINE_")}


def mounts(file: str, service: str) -> dict[str, str]:
    """Where what is mounted: source by target."""
    volumes = services(file)[service].get("volumes", [])
    return {target: source for source, target, *_ in (filled_in(mount).split(":") for mount in volumes)}


def path(file: str) -> Path:
    return FOLDER / file


def _merged(base: Any, own: Any) -> Any:
    if isinstance(base, dict) and isinstance(own, dict):
        return {
            key: _merged(base[key], own[key]) if key in base and key in own else deepcopy({**base, **own}[key])
            for key in {**base, **own}
        }
    return [*base, *own] if isinstance(base, list) else own
