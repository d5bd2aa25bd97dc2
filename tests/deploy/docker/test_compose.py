"""The compose files against their schema, the Dockerfile, the services' settings and the files that they mount."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.docker.compose import FILES, compose, defaults, filled_in, mounts, path, services, settings
from tests.deploy.docker.dockerfile import FOLDER, read_stages
from tests.deploy.docker.tools import check, find_tool
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.llm_worker.config import LlmConfig

FILE = "compose.yaml"
ALL_FILES = pytest.mark.parametrize("file", FILES)
ALL_SERVICES = pytest.mark.parametrize(("file", "service"), [(file, name) for file in FILES for name in services(file)])
BUILT = pytest.mark.parametrize(
    ("file", "service"), [(file, name) for file in FILES for name, each in services(file).items() if "build" in each]
)


def _encoder_config(monkeypatch: pytest.MonkeyPatch) -> EncoderConfig:
    for name, value in settings(FILE, "encoder").items():
        assert name.removeprefix("VITRINE_ENCODER_").lower() in EncoderConfig.model_fields
        monkeypatch.setenv(name, value)
    return EncoderConfig.from_command_line([])


def _llm_config(monkeypatch: pytest.MonkeyPatch) -> LlmConfig:
    for name, value in settings(FILE, "llm").items():
        assert name.removeprefix("VITRINE_LLM_").lower() in LlmConfig.model_fields
        monkeypatch.setenv(name, value)
    return LlmConfig.from_command_line([])


@ALL_FILES
def test_it_keeps_to_the_schema_of_compose_files(file: str) -> None:
    checker = find_tool("check-jsonschema", "pip install check-jsonschema")
    check(checker, "--builtin-schema", "vendor.compose-spec", str(path(file)))


@ALL_FILES
def test_docker_compose_reads_it(file: str) -> None:
    docker = find_tool("docker", "Docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("this docker has no compose plugin")
    check(docker, "compose", "--file", str(path(file)), "--profile", "observability", "config", "--quiet")


def test_worker_and_encoder_find_each_other_and_share_what_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, llm = _encoder_config(monkeypatch), _llm_config(monkeypatch)
    assert llm.encoders == f"encoder:{encoder.port}"
    assert llm.model == encoder.model
    assert llm.shm_folder == encoder.shm_folder
    assert llm.transport == "auto"
    for service in ("encoder", "llm"):
        assert mounts(FILE, service)[encoder.shm_folder] == "shm"
        [device] = services(FILE)[service]["deploy"]["resources"]["reservations"]["devices"]
        assert device["count"] == "all", "CUDA IPC needs the other service's GPU to be visible"
    assert services(FILE)["llm"]["depends_on"] == {"encoder": {"condition": "service_healthy"}}
    volume = compose(FILE)["volumes"]["shm"]
    options = dict(option.split("=") for option in filled_in(volume["driver_opts"]["o"]).split(","))
    assert int(options["size"].removesuffix("m")) * 2**20 >= encoder.pool_bytes
    assert options["uid"] == read_stages()["encoder"].arguments("USER")[0].partition(":")[0]


@BUILT
def test_images_are_the_dockerfiles(file: str, service: str) -> None:
    definition = services(file)[service]
    build = definition["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")
    target = read_stages()[build["target"]]
    name, _, version = filled_in(definition["image"]).partition(":")
    assert any(f'image.title="{name}"' in label for label in target.arguments("LABEL"))
    assert f"VERSION={version.removesuffix('-cpu')}" in read_stages()["runtime"].arguments("ARG")
    for argument in build.get("args", {}):
        assert re.search(rf"(?m)^ARG {argument}=", (FOLDER / "Dockerfile").read_text())


def test_it_stops_no_service_while_that_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    drains = _encoder_config(monkeypatch).drain_timeout_s, _llm_config(monkeypatch).drain_timeout_s
    for service in ("encoder", "llm"):
        assert int(services(FILE)[service]["stop_grace_period"].removesuffix("s")) >= max(drains) + 10


@ALL_SERVICES
def test_no_service_has_rights_that_it_does_not_need(file: str, service: str) -> None:
    definition = services(file)[service]
    assert definition["read_only"] is True
    assert definition["cap_drop"] == ["ALL"]
    assert definition["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add"} & set(definition)
    assert definition.get("user", "10001:10001") == "10001:10001"
    assert all(port.startswith("127.0.0.1:") for port in definition.get("ports", []))
    assert ":" in definition["image"]
    assert not definition["image"].endswith(":latest")


@ALL_SERVICES
def test_what_it_mounts_exists(file: str, service: str) -> None:
    for mount in services(file)[service].get("volumes", []):
        source, _, *mode = filled_in(mount).split(":")
        if source.startswith("."):
            assert (FOLDER / source).exists(), source
            assert mode == ["ro"]
        else:
            assert source in compose(file)["volumes"]


@ALL_FILES
def test_the_default_model_ships_along(file: str) -> None:
    model = Path(defaults(file)["MODEL"]).relative_to("/models")
    assert (FOLDER / defaults(file)["MODELS_FOLDER"] / model / "config.json").exists()


def test_the_example_of_settings_shows_every_variable_with_its_default() -> None:
    lines = (FOLDER / ".env.example").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    for file in FILES:
        assert defaults(file).items() <= found.items()
    assert found.keys() == {name for file in FILES for name in defaults(file)}
    further = {line[2:].partition("=")[0] for line in lines if re.match(r"# [A-Z_]+=", line)}
    for name in further - {"MODEL", "HF_TOKEN"}:
        assert name.removeprefix("VITRINE_ENCODER_").lower() in EncoderConfig.model_fields


def test_prometheus_scrapes_the_ports_of_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    scraped = yaml.safe_load((FOLDER / "../observability/prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for each in job["static_configs"] for target in each["targets"]}
    encoder, llm = _encoder_config(monkeypatch), _llm_config(monkeypatch)
    assert targets == {f"encoder:{encoder.metrics_port}", f"llm:{llm.port}"}
