"""The configuration files are what the services take: they are read by the services' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.helm.flags import SGLANG_FLAGS, VLLM_FLAGS
from tests.helm.rendering import CHART, NAMESPACE, VALUES, Manifest, of_kind, pod_templates, render, rendered, values_of
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.service_runtime.settings import ServiceSettings
from vitrine_vlm.vllm_connector.settings import ConnectorSettings

CLASSES: dict[str, type[ServiceSettings]] = {"encoder": EncoderConfig, "llm": LlmConfig, "gateway": GatewayConfig}


def config_files(manifests: list[Manifest]) -> dict[str, dict[str, Any]]:
    """By pod."""
    return {pod.name: yaml.safe_load(pod.config_file) for pod in pod_templates(manifests) if pod.config_file}


def read(config: dict[str, Any], program: str) -> ServiceSettings:
    return CLASSES[program](**config)


@pytest.mark.parametrize("values", sorted(VALUES.keys() - {"rayservice"}))
def test_the_services_take_their_files(values: str) -> None:
    manifests = rendered(values)
    files = config_files(manifests)
    pods = list(pod_templates(manifests))
    assert len(files) == len(pods)
    for pod in pods:
        config = files[pod.name]
        if pod.program not in CLASSES:  # see test_vllm.py and test_sglang.py
            continue
        settings = read(config, pod.program)
        for key, value in config.items():
            assert settings.model_dump(mode="json")[key] == value
        (mount,) = (each for each in pod.container["volumeMounts"] if each["name"] == "config")
        variable = f"{settings.model_config.get('env_prefix')}CONFIG"
        assert pod.env[variable] == f"{mount['mountPath']}/config.yaml"
        assert settings.model_dump()["host"] == "0.0.0.0"


def test_what_the_chart_sets_is_not_for_pools_to_set() -> None:
    """And the list of such settings names nothing that the services do not have."""
    reserved = yaml.safe_load((CHART / "files/checks/own_settings.yaml").read_text()).keys()
    ours = {name for settings in CLASSES.values() for name in settings.model_fields}
    assert reserved <= ours | ConnectorSettings.model_fields.keys() | VLLM_FLAGS | SGLANG_FLAGS
    for values in ("tls", "host-path", "cpu", "pools", "vllm", "vllm-own-tower", "sglang"):
        own = set(values_of(values).get("gateway", {}).get("config", {}))
        for part in ("encoders", "llm"):
            for pool in (values_of(values).get(part, {}).get("defaults", {}), *_pools(values, part)):
                own |= pool.get("config", {}).keys()
        for config in config_files(rendered(values)).values():
            changeable = {"cuda_ipc_pool_bytes", "limit_mm_per_prompt", "allowed_peers", "shared_pool_peers"}
            assert config.keys() - own <= reserved | changeable


def _pools(values: str, part: str) -> list[dict[str, Any]]:
    return [pool or {} for pool in values_of(values).get(part, {}).get("pools", {}).values()]


def test_encoders_know_their_peers_by_name_where_these_have_certificates() -> None:
    tls = {"secretName": "s", "allowedPeers": "*.workers", "sharedPoolPeers": "a.workers"}
    without = {"secretName": "s"}
    for given, expected in (({**tls, "clientAuth": True}, ("*.workers", "a.workers")), (without, ("", ""))):
        manifests = render({"model": "m", "tls": {"encoders": given}})
        config = read(config_files(manifests)["demo-vitrine-encoder-default"], "encoder").model_dump()
        assert (config["allowed_peers"], config["shared_pool_peers"]) == expected


def test_settings_of_a_pool_win_over_the_defaults() -> None:
    files = config_files(rendered("pools"))
    assert files["demo-vitrine-encoder-default"]["quantization"] == "none"
    assert files["demo-vitrine-encoder-slices"]["quantization"] == "fp8"
    for pool in ("default", "slices"):
        assert files[f"demo-vitrine-encoder-{pool}"]["cuda_graphs"] is False
        assert files[f"demo-vitrine-encoder-{pool}"]["lease_ttl_s"] == 20.5
    assert files["demo-vitrine-llm-short"]["kv_cache_tokens"] == 1048576
    assert files["demo-vitrine-encoder-default"]["model"] == "Qwen/Qwen3-VL-8B-Instruct"
    assert files["demo-vitrine-encoder-default"]["revision"] == "main"
    assert files["demo-vitrine-encoder-default"]["served_model_name"] == "qwen3-vl-8b"


def test_a_name_that_looks_like_a_number_stays_a_name() -> None:
    files = config_files(render({"model": "123", "revision": "1e3"}))
    assert {(each["model"], each["revision"]) for each in files.values()} == {("123", "1e3")}


def test_logs_and_traces() -> None:
    for config in config_files(rendered("cpu")).values():
        assert (config["log_level"], config["log_format"]) == ("debug", "text")
        assert config["otlp_endpoint"] == "http://collector.monitoring:4317"


def test_settings_are_in_the_pods_template_so_that_each_replica_set_keeps_its_own() -> None:
    for values in sorted(VALUES.keys() - {"rayservice"}):
        for pod in pod_templates(rendered(values)):
            volumes = {each["name"]: each for each in pod.spec["volumes"]}
            (item,) = volumes["config"]["downwardAPI"]["items"]
            assert item["path"] == "config.yaml"
            assert item["fieldRef"]["fieldPath"] == "metadata.annotations['vitrine/config']"
            assert not any("configMap" in each for each in volumes.values())


def test_a_change_of_the_file_restarts_the_pods_it_is_for() -> None:
    def files(values: dict[str, Any]) -> dict[str, str]:
        pods = pod_templates(render({"model": "m"} | values))
        return {pod.name: str(pod.config_file) for pod in pods}

    before = files({})
    encoder, llm = "demo-vitrine-encoder-default", "demo-vitrine-llm-default"
    after = files({"encoders": {"pools": {"default": {"config": {"max_items": 3}}}}})
    assert after[encoder] != before[encoder]
    assert after[llm] == before[llm]
    after = files({"log": {"level": "debug"}})
    assert after[encoder] != before[encoder]
    assert after[llm] != before[llm]


class TestEncoders:
    """How workers find them."""

    def test_by_the_api_server(self) -> None:
        config = config_files(rendered("default"))["demo-vitrine-llm-default"]
        assert config["encoders"] == f"kubernetes:{NAMESPACE}/demo-vitrine-encoder-default:grpc"

    def test_by_dns(self) -> None:
        files = config_files(rendered("pools"))
        slices = f"dns:demo-vitrine-encoder-slices.{NAMESPACE}.svc:50051"
        assert files["demo-vitrine-llm-short"]["encoders"] == slices
        every = f"dns:demo-vitrine-encoder-default.{NAMESPACE}.svc:50051,{slices}"
        assert files["demo-vitrine-llm-long"]["encoders"] == every

    @pytest.mark.parametrize("values", ["default", "pools", "resource-claim"])
    def test_services_and_ports_exist(self, values: str) -> None:
        services = of_kind(rendered(values), "Service")
        for name, config in config_files(rendered(values)).items():
            if "-encoder-" in name:
                continue
            for source in config["encoders"].split(","):
                kind, where, port = source.split(":")
                if kind == "kubernetes":
                    namespace, service = where.split("/")
                else:
                    service, namespace, suffix = where.split(".")
                    assert suffix == "svc"
                ports = services[service]["spec"]["ports"]
                assert namespace == NAMESPACE
                assert services[service]["spec"]["clusterIP"] == "None"
                assert any(port in (each["name"], str(each["port"])) for each in ports)


class TestTransports:
    """Memory for transports within a node is taken only where a peer can reach it, and in the same place."""

    def test_none(self) -> None:
        config = config_files(rendered("default"))["demo-vitrine-encoder-default"]
        assert config["shm_folder"] == ""
        assert config["cuda_ipc_pool_bytes"] == 0

    @pytest.mark.parametrize("values", ["runtime-class", "resource-claim"])
    def test_cuda_ipc(self, values: str) -> None:
        config = config_files(rendered(values))["demo-vitrine-encoder-default"]
        assert "cuda_ipc_pool_bytes" not in config
        assert config["shm_folder"] == ""

    def test_shared_memory(self) -> None:
        files = config_files(rendered("host-path"))
        pods = list(pod_templates(rendered("host-path")))
        mounts = [each for pod in pods for each in pod.container["volumeMounts"] if each["name"] == "shm"]
        (volume,) = {each["hostPath"]["path"] for pod in pods for each in pod.spec["volumes"] if each["name"] == "shm"}
        assert volume == "/dev/shm/vitrine"
        assert len(mounts) == len(pods) == len(files) == 2
        assert {each["shm_folder"] for each in files.values()} == {each["mountPath"] for each in mounts}

    def test_a_pool_may_say_otherwise(self) -> None:
        values = {"model": "m", "encoders": {"defaults": {"config": {"cuda_ipc_pool_bytes": 2147483648}}}}
        assert config_files(render(values))["demo-vitrine-encoder-default"]["cuda_ipc_pool_bytes"] == 2147483648


class TestTls:
    def files_of(self, values: str, name: str) -> set[str]:
        """Paths that mounted Secrets give a pod."""
        (pod,) = (each for each in pod_templates(rendered(values)) if each.name == name)
        volumes = {each["name"]: each["secret"] for each in pod.spec["volumes"] if "secret" in each}
        found = set()
        for mount in pod.container["volumeMounts"]:
            if secret := volumes.get(mount["name"]):
                items = secret.get("items", [{"path": path} for path in ("tls.crt", "tls.key", "ca.crt")])
                found |= {f"{mount['mountPath']}/{item['path']}" for item in items}
        return found

    @pytest.mark.parametrize("values", ["tls", "server-tls"])
    def test_files_that_are_named_are_there(self, values: str) -> None:
        files = config_files(rendered(values))
        assert len(files) == 2
        for name, config in files.items():
            named = {value for key, value in config.items() if key.endswith("_file")}
            assert named
            assert named <= self.files_of(values, name)

    def test_both_sides_show_certificates(self) -> None:
        files = config_files(rendered("tls"))
        encoder, llm = files["demo-vitrine-encoder-default"], files["demo-vitrine-llm-default"]
        assert encoder["tls_client_ca_file"] and llm["tls_client_ca_file"]
        assert llm["encoder_cert_file"] and llm["encoder_key_file"] and llm["encoder_ca_file"]

    def test_only_servers_show_certificates(self) -> None:
        files = config_files(rendered("server-tls"))
        encoder, llm = files["demo-vitrine-encoder-default"], files["demo-vitrine-llm-default"]
        assert "tls_client_ca_file" not in encoder | llm
        assert llm["encoder_server_name"] == "encoders.vitrine"
        assert llm["encoder_ca_file"]
        assert "encoder_key_file" not in llm
        # The encoders' private key is none of the workers' business.
        folder = llm["encoder_ca_file"].rsplit("/", 1)[0]
        assert {each for each in self.files_of("server-tls", "demo-vitrine-llm-default") if folder in each} == {
            llm["encoder_ca_file"]
        }
