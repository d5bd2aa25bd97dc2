"""The compose file against its schema, the Dockerfile, the services' settings and the files that it mounts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.docker.dockerfile import FOLDER, environment, read_stages
from tests.deploy.docker.tools import check, find_tool
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.llm_worker.config import LlmConfig

FILE = FOLDER / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
DEFAULTS = dict(VARIABLE.findall(FILE.read_text()))


def _filled_in(text: str) -> str:
    return VARIABLE.sub(lambda match: match[2] or "", text)


def _settings(service: str) -> dict[str, str]:
    """The service's VITRINE_* variables: of its image, then of the compose file."""
    own = {name: _filled_in(value) for name, value in SERVICES[service]["environment"].items()}
    both = environment(read_stages(), service) | own
    return {name: value for name, value in both.items() if name.startswith("VITRINE_")}


def _encoder_config(monkeypatch: pytest.MonkeyPatch) -> EncoderConfig:
    for name, value in _settings("encoder").items():
        assert name.removeprefix("VITRINE_ENCODER_").lower() in EncoderConfig.model_fields
        monkeypatch.setenv(name, value)
    return EncoderConfig.from_command_line([])


def _llm_config(monkeypatch: pytest.MonkeyPatch) -> LlmConfig:
    for name, value in _settings("llm").items():
        assert name.removeprefix("VITRINE_LLM_").lower() in LlmConfig.model_fields
        monkeypatch.setenv(name, value)
    return LlmConfig.from_command_line([])


def test_it_keeps_to_the_schema_of_compose_files() -> None:
    checker = find_tool("check-jsonschema", "pip install check-jsonschema")
    check(checker, "--builtin-schema", "vendor.compose-spec", str(FILE))


def test_docker_compose_reads_it() -> None:
    docker = find_tool("docker", "Docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("this docker has no compose plugin")
    check(docker, "compose", "--file", str(FILE), "--profile", "observability", "config", "--quiet")


def test_worker_and_encoder_find_each_other_and_share_what_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, llm = _encoder_config(monkeypatch), _llm_config(monkeypatch)
    assert llm.encoders == f"encoder:{encoder.port}"
    assert llm.model == encoder.model
    assert llm.shm_folder == encoder.shm_folder
    assert llm.transport == "auto"
    for service in ("encoder", "llm"):
        mounts = dict(_filled_in(mount).split(":")[:2] for mount in SERVICES[service]["volumes"])
        assert mounts["shm"] == encoder.shm_folder
        [device] = SERVICES[service]["deploy"]["resources"]["reservations"]["devices"]
        assert device["count"] == "all", "CUDA IPC needs the other service's GPU to be visible"
    assert SERVICES["llm"]["depends_on"] == {"encoder": {"condition": "service_healthy"}}
    options = dict(option.split("=") for option in _filled_in(COMPOSE["volumes"]["shm"]["driver_opts"]["o"]).split(","))
    assert int(options["size"].removesuffix("m")) * 2**20 >= encoder.pool_bytes
    assert options["uid"] == read_stages()["encoder"].arguments("USER")[0].partition(":")[0]


@pytest.mark.parametrize("service", ["encoder", "llm"])
def test_images_are_the_dockerfiles(service: str) -> None:
    build = SERVICES[service]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).samefile(FOLDER / "Dockerfile")
    target = read_stages()[build["target"]]
    name, _, version = _filled_in(SERVICES[service]["image"]).partition(":")
    assert any(f'image.title="{name}"' in label for label in target.arguments("LABEL"))
    assert f"VERSION={version}" in read_stages()["runtime"].arguments("ARG")


def test_it_stops_no_service_while_that_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    drains = _encoder_config(monkeypatch).drain_timeout_s, _llm_config(monkeypatch).drain_timeout_s
    for service in ("encoder", "llm"):
        assert int(SERVICES[service]["stop_grace_period"].removesuffix("s")) >= max(drains) + 10


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_has_rights_that_it_does_not_need(service: str) -> None:
    settings = SERVICES[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "user", "cap_add"} & set(settings)
    assert all(port.startswith("127.0.0.1:") for port in settings.get("ports", []))
    assert not settings["image"].endswith(":latest")


@pytest.mark.parametrize("service", SERVICES)
def test_what_it_mounts_exists(service: str) -> None:
    for mount in SERVICES[service]["volumes"]:
        source, _, *mode = _filled_in(mount).split(":")
        if source.startswith("."):
            assert (FOLDER / source).exists(), source
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]
    model = _filled_in(SERVICES["llm"]["environment"]["VITRINE_LLM_MODEL"])
    assert (FOLDER / DEFAULTS["MODELS_FOLDER"] / Path(model).relative_to("/models") / "config.json").exists()


def test_the_example_of_settings_shows_every_variable_with_its_default() -> None:
    lines = (FOLDER / ".env.example").read_text().splitlines()
    assert dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) == DEFAULTS
    further = {line[2:].partition("=")[0] for line in lines if re.match(r"# [A-Z_]+=", line)}
    for name in further - {"MODEL", "HF_TOKEN"}:
        assert name.removeprefix("VITRINE_ENCODER_").lower() in EncoderConfig.model_fields


def test_prometheus_scrapes_the_ports_of_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    scraped = yaml.safe_load((FOLDER / "../observability/prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for each in job["static_configs"] for target in each["targets"]}
    encoder, llm = _encoder_config(monkeypatch), _llm_config(monkeypatch)
    assert targets == {f"encoder:{encoder.metrics_port}", f"llm:{llm.port}"}
