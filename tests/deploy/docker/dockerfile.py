"""The Dockerfile as stages of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy/docker"
DOCKERFILE = FOLDER / "Dockerfile"


@dataclass
class Stage:
    """parent: name of the stage it is made from, or an image."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def arguments(self, keyword: str) -> list[str]:
        return [argument for name, argument in self.instructions if name == keyword]

    def copied_from_context(self) -> list[str]:
        return [name for copy in self.arguments("COPY") if "--from=" not in copy for name in copy.split()[:-1]]


def read_stages() -> dict[str, Stage]:
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, argument = line.partition(" ")
        if keyword == "FROM":
            parent, _, name = argument.partition(" AS ")
            stage = stages[name] = Stage(name, parent)
        elif stages:
            stage.instructions.append((keyword, re.sub(r"\s+", " ", argument)))
    return stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """The stage and those it is made from, itself last."""
    stage = stages.get(name)
    return [*lineage(stages, stage.parent), stage] if stage else []


def environment(stages: dict[str, Stage], name: str) -> dict[str, str]:
    settings = " ".join(argument for stage in lineage(stages, name) for argument in stage.arguments("ENV"))
    return dict(setting.split("=", 1) for setting in settings.split())
