"""docs/install.md: what it says to type works, as far as it can be run without Docker, a registry and a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.deploy.docker.compose import defaults, mounts, services, settings
from tests.deploy.docker.dockerfile import FOLDER, read_stages
from tests.docs.install_page import ROOT, blocks, commands
from tests.helm.rendering import of_kind, pod_templates, render
from vitrine_vlm.deploy.launcher.stack import free_ports
from vitrine_vlm.deploy.ray_serve.config import ServeArguments
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

COMPOSE = "compose.cpu.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
READY_S = 150
KUBERNETES = "In Kubernetes"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """HTTP port of the worker, once the services of compose.cpu.yaml run as their containers would start them."""
    http_port, grpc_port, encoder_port, metrics_port = free_ports(4)
    shared = tmp_path_factory.mktemp("shared")
    own: dict[str, dict[str, int | str]] = {
        "encoder": {"PORT": encoder_port, "METRICS_PORT": metrics_port},
        "llm": {"PORT": http_port, "GRPC_PORT": grpc_port, "ENCODERS": f"127.0.0.1:{encoder_port}"},
    }
    running = [_start(service, variables, shared) for service, variables in own.items()]
    try:
        deadline = time.monotonic() + READY_S
        while not _healthy("llm", grpc_port):
            assert time.monotonic() < deadline and all(each.poll() is None for each in running), "not healthy in time"
            time.sleep(0.2)
        assert _healthy("encoder", encoder_port)
        yield http_port
    finally:
        for process in reversed(running):
            process.terminate()
        assert [process.wait(30) for process in running] == [0, 0]


def _start(service: str, variables: dict[str, int | str], shared: Path) -> subprocess.Popen[bytes]:
    """By its image's entrypoint, with the settings of image and compose file, but folders and addresses of here."""
    prefix = f"VITRINE_{service.upper()}_"
    found = settings(COMPOSE, service)
    [shm] = [target for target, source in mounts(COMPOSE, service).items() if source == "shm"]
    assert found[f"{prefix}SHM_FOLDER"] == shm
    models = str((FOLDER / mounts(COMPOSE, service)["/models"]).resolve())
    here = {prefix + name: str(value) for name, value in variables.items()}
    here |= {f"{prefix}HOST": "127.0.0.1", f"{prefix}SHM_FOLDER": str(shared)}
    here[f"{prefix}MODEL"] = found[f"{prefix}MODEL"].replace("/models", models)
    entrypoint = json.loads(read_stages()[service].arguments("ENTRYPOINT")[0])
    command = [sys.executable, "-I", str(FOLDER / Path(entrypoint[2]).name), *entrypoint[3:]]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(command, env=os.environ | found | here | {"PATH": path, "OMP_NUM_THREADS": "1"})


def _healthy(service: str, port: int) -> bool:
    [check] = read_stages()[service].arguments("HEALTHCHECK")
    program, _ = json.loads(check.partition(" CMD ")[2])
    probe = [str(Path(sys.executable).parent / program), f"127.0.0.1:{port}"]
    return subprocess.run(probe, capture_output=True, timeout=30, check=False).returncode == 0


def test_the_question_is_answered_by_the_services_of_the_compose_file(port: int) -> None:
    [question] = blocks("The question")
    assert "http://127.0.0.1:8000/" in question
    script = question.replace(":8000/", f":{port}/").replace("curl", "curl --silent")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip(" .") == "2", done.stdout


def test_the_question_names_the_model_that_every_way_serves() -> None:
    [question] = blocks("The question")
    assert question.startswith(f"MODEL={MODEL_FOLDER.name}\n")
    assert Path(defaults(COMPOSE)["MODEL"]).name == MODEL_FOLDER.name
    [run] = commands("On Ray", "serve")
    assert run[-1].endswith(f"/{MODEL_FOLDER.name}")


def test_ray_takes_the_arguments_and_finds_the_model() -> None:
    [run] = commands("On Ray", "serve")
    assert run[:3] == ["serve", "run", "vitrine_vlm.deploy.ray_serve.application:build"]
    given = dict(argument.replace("$PWD", str(ROOT)).split("=", 1) for argument in run[3:])
    assert Path(ServeArguments.model_validate(given).model).samefile(MODEL_FOLDER)
    [install] = commands("On Ray", ".venv/bin/pip")
    assert install[-1] == ".[serve]" and "serve" in PROJECT["optional-dependencies"]


def test_compose_files_that_are_named_are_there_and_need_no_gpu() -> None:
    [folder] = commands("With containers", "cd")
    [up] = commands("With containers", "docker")
    assert up[2:4] == ["--file", COMPOSE] and (ROOT / folder[1] / COMPOSE).exists()
    assert not any("deploy" in service for service in services(COMPOSE).values())


@pytest.mark.parametrize("which", [0, 1], ids=["with GPUs", "on CPUs"])
def test_the_charts_pods_have_the_images_that_were_pushed(which: int) -> None:
    pushed, installed = commands(KUBERNETES, "make")[which], commands(KUBERNETES, "helm")[which]
    values = _values(installed)
    variables = dict(word.split("=", 1) for word in pushed[2:])
    tag = PROJECT["version"] + ("-cpu" if variables.get("BASE") == "cpu" else "")
    built = {f"{variables['REGISTRY']}/vitrine-{image}:{tag}" for image in variables["IMAGES"].split()}
    assert variables["PUSH"] == "1"
    manifests = render(values, release=installed[2])
    pods = list(pod_templates(manifests))
    assert {pod.container["image"] for pod in pods} == built
    gpus = {pod.container["resources"].get("limits", {}).get("nvidia.com/gpu") for pod in pods}
    assert gpus == ({None} if which else {1})


def test_kubectl_finds_pods_and_service() -> None:
    installed = commands(KUBERNETES, "helm")[0]
    manifests = render(_values(installed), release=installed[2])
    get, forward = commands(KUBERNETES, "kubectl")
    key, _, value = get[get.index("--selector") + 1].partition("=")
    pods = list(pod_templates(manifests))
    assert pods and all(pod.metadata["labels"][key] == value for pod in pods)
    kind, _, name = forward[2].partition("/")
    service = of_kind(manifests, kind.capitalize())[name]
    assert int(forward[3]) in {each["port"] for each in service["spec"]["ports"]}


def _values(helm: list[str]) -> dict[str, object]:
    """What `--set` gives, as Helm reads it."""
    values: dict[str, object] = {}
    for name, value in (word.split("=", 1) for flag, word in pairwise(helm) if flag == "--set"):
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})  # type: ignore[assignment]
        place[last] = yaml.safe_load(value)
    return values


@pytest.mark.parametrize(
    "page", ["README.md", "docs/operations.md", "helm/vitrine/README.md", "deploy/docker/README.md"]
)
def test_readers_find_the_page(page: str) -> None:
    assert "install.md" in (ROOT / page).read_text()
