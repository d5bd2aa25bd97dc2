"""A client of the services needs only the base dependencies and torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
# Imports by hand what is named on the command line, where everything else that is installed here is not to be found.
PROGRAM = """
import importlib, importlib.abc, sys
forbidden = set(sys.argv[1].split(","))

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""
CLIENT = (
    "vitrine_vlm.embedding_transport.clients.encoder_client",
    "vitrine_vlm.protos.llm.v1.llm_pb2_grpc",
    "vitrine_vlm.protos.encoder.v1.encoder_pb2_grpc",
    "vitrine_vlm.service_runtime.health_command",
)


def _closure(names: set[str]) -> set[str]:
    """Distributions with all that they require, without extras."""
    seen: set[str] = set()
    pending = set(names)
    while pending:
        seen.add(name := pending.pop())
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending |= {canonicalize_name(requirement.name)} - seen
    return seen


@cache
def _forbidden() -> set[str]:
    base = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    allowed = _closure({*base, "torch"}) | {"vitrine-vlm"}
    return {
        module
        for module, distributions in packages_distributions().items()
        if module.isidentifier() and not {canonicalize_name(name) for name in distributions} & allowed
    }


def _import(*modules: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", PROGRAM, ",".join(_forbidden()), *modules]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_client_needs_our_base_dependencies_and_torch_only() -> None:
    assert {"transformers", "aiohttp", "pydantic", "av", "PIL", "ray", "safetensors"} <= _forbidden()
    done = _import(*CLIENT)
    assert done.returncode == 0, done.stderr


def test_a_service_needs_its_extra() -> None:
    """The check above can fail: what it hides is missed."""
    assert "ModuleNotFoundError" in _import("vitrine_vlm.service_runtime.settings").stderr
