"""compose.vllm.yaml and compose.sglang.yaml: the services find each other and share what they must."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deploy.docker.compose import compose, filled_in, mounts, services, settings
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.sglang.receivers import AllowedReceivers
from vitrine_vlm.encoder_service.sglang.versions import receiver_class
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.service_runtime.settings import SettingsT
from vitrine_vlm.vllm_connector.settings import ConnectorSettings

VLLM, SGLANG = "compose.vllm.yaml", "compose.sglang.yaml"


def read(config: type[SettingsT], file: str, service: str, monkeypatch: pytest.MonkeyPatch) -> SettingsT:
    """The settings of a service of ours, of its image and the compose file."""
    with monkeypatch.context() as patch:
        for name, value in settings(file, service).items():
            patch.setenv(name, value)
        return config.from_command_line([])


def flags(file: str, service: str) -> dict[str, str]:
    """What the command sets; without a value, the empty text."""
    pairs = (filled_in(flag).partition("=") for flag in services(file)[service]["command"] if flag.startswith("--"))
    return {name.removeprefix("--"): value for name, _, value in pairs}


@pytest.mark.parametrize(("file", "service"), [(VLLM, "vllm"), (VLLM, "gateway"), (SGLANG, "sglang")])
def test_services_wait_for_what_they_need(file: str, service: str) -> None:
    needed = services(file)[service]["depends_on"]
    assert needed.keys() == ({"encoder", "vllm"} if service == "gateway" else {"encoder"})
    assert {each["condition"] for each in needed.values()} == {"service_healthy"}


@pytest.mark.parametrize(("file", "service"), [(VLLM, "vllm"), (SGLANG, "sglang")])
def test_engines_load_the_encoders_model_on_their_own_part_of_the_gpu(
    file: str, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = read(EncoderConfig, file, "encoder", monkeypatch)
    model = flags(file, service).get("model-path", filled_in(services(file)[service]["command"][0]))
    assert model == encoder.model
    share = "gpu-memory-utilization" if service == "vllm" else "mem-fraction-static"
    assert float(flags(file, service)[share]) == 0.5
    assert mounts(file, service)["/models"] == mounts(file, "encoder")["/models"]
    assert mounts(file, service)["/cache"] == "cache"
    assert services(file)[service]["shm_size"] == "8g"


class TestVllm:
    def connector(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(flags(VLLM, "vllm")["ec-transfer-config"])
        return found

    def test_the_connector_finds_the_encoder_and_shares_memory_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = read(EncoderConfig, VLLM, "encoder", monkeypatch)
        connector = ConnectorSettings.from_extra_config(self.connector()["ec_connector_extra_config"])
        assert connector.encoders == f"encoder:{encoder.port}"
        assert connector.shm_folder == encoder.shm_folder
        assert mounts(VLLM, "vllm")[connector.shm_folder] == mounts(VLLM, "encoder")[encoder.shm_folder] == "shm"
        for service in ("encoder", "vllm"):
            [device] = services(VLLM)[service]["deploy"]["resources"]["reservations"]["devices"]
            assert device["count"] == "all", "CUDA IPC needs the other service's GPU to be visible"

    def test_vllm_loads_no_tower_and_the_gateway_sends_metadata(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert json.loads(flags(VLLM, "vllm")["limit-mm-per-prompt"]) == {"image": 0, "video": 0}
        encoder = read(EncoderConfig, VLLM, "encoder", monkeypatch)
        gateway = read(GatewayConfig, VLLM, "gateway", monkeypatch)
        assert gateway.encoders == f"encoder:{encoder.port}"
        assert gateway.servers == "vllm:8000"
        assert gateway.tenant == self.connector()["ec_connector_extra_config"].get("tenant", "")

    def test_users_reach_the_gateway_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gateway = read(GatewayConfig, VLLM, "gateway", monkeypatch)
        published = {name: each["ports"] for name, each in services(VLLM).items() if "ports" in each}
        assert published.keys() == {"gateway"}
        [port] = published["gateway"]
        assert filled_in(port).split(":")[-1] == str(gateway.port)

    def test_it_stops_no_service_while_that_drains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drains = {
            "vllm": int(flags(VLLM, "vllm")["shutdown-timeout"]),
            "gateway": read(GatewayConfig, VLLM, "gateway", monkeypatch).drain_timeout_s,
        }
        for service, drain_s in drains.items():
            assert int(services(VLLM)[service]["stop_grace_period"].removesuffix("s")) >= drain_s + 10


class TestSglang:
    async def test_encoder_and_server_find_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = read(EncoderConfig, SGLANG, "encoder", monkeypatch)
        server = flags(SGLANG, "sglang")
        assert encoder.sglang_register == f"http://sglang:{server['encoder-bootstrap-port']}"
        assert encoder.sglang_advertise_host == "encoder"
        assert "language-only" in server
        AllowedReceivers(encoder.sglang_receivers).close()
        assert encoder.sglang_receivers in services(SGLANG)

    def test_encoders_send_what_this_version_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = read(EncoderConfig, SGLANG, "encoder", monkeypatch)
        assert filled_in(services(SGLANG)["sglang"]["image"]) == f"lmsysorg/sglang:v{encoder.sglang_version}"
        receiver_class(encoder.sglang_version)

    def test_what_the_server_writes_has_a_volume(self) -> None:
        environment = services(SGLANG)["sglang"]["environment"]
        assert environment["HOME"] in mounts(SGLANG, "sglang")
        assert services(SGLANG)["sglang"]["user"] == "10001:10001"
        assert "uid=10001" in compose(SGLANG)["volumes"]["shm"]["driver_opts"]["o"]
