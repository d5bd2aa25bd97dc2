"""`engine: vllm`: unmodified vLLM with the connector, and in mode M the gateway in front of it."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmError

from tests.helm.flags import VLLM_FLAGS
from tests.helm.rendering import (
    NAMESPACE,
    REGISTRY,
    VALUES,
    Manifest,
    of_kind,
    pods,
    pods_selected,
    render,
    rendered,
    values_of,
)
from tests.helm.test_config import config_files
from tests.helm.test_network_policies import NODE, PROMETHEUS, STRANGER, allowed
from vitrine_vlm.vllm_connector.settings import ConnectorSettings

ENCODER, LLM, GATEWAY = "demo-vitrine-encoder-default", "demo-vitrine-llm-default", "demo-vitrine-gateway"
WITH_VLLM = [name for name in VALUES if values_of(name).get("engine") == "vllm"]


def vllm_files(manifests: list[Manifest]) -> dict[str, dict[str, Any]]:
    """Configuration files of vLLM's pools."""
    return {name: config for name, config in config_files(manifests).items() if "ec_transfer_config" in config}


def connector_of(config: dict[str, Any]) -> ConnectorSettings:
    return ConnectorSettings.from_extra_config(config["ec_transfer_config"]["ec_connector_extra_config"])


@pytest.mark.parametrize("values", WITH_VLLM)
def test_the_connector_takes_its_settings(values: str) -> None:
    files = vllm_files(rendered(values))
    assert files.keys() == {name for name, pod in pods(values).items() if pod.program == "vllm"}
    own = {name for pool in _pools(values) for name in pool.get("config", {})}
    for config in files.values():
        assert config.keys() - own <= VLLM_FLAGS
        transfer = config["ec_transfer_config"]
        assert transfer["ec_connector"] == "VitrineConnector"
        assert transfer["ec_connector_module_path"] == "vitrine_vlm.vllm_connector.connector"
        assert transfer["ec_role"] == "ec_consumer"
        assert connector_of(config).encoders


def _pools(values: str) -> list[dict[str, Any]]:
    llm = values_of(values).get("llm", {})
    return [llm.get("defaults", {}), *(llm.get("pools", {}).values())]


class TestModeM:
    """With a gateway."""

    def test_vllm_loads_no_tower(self) -> None:
        for config in vllm_files(rendered("vllm")).values():
            assert config["limit_mm_per_prompt"] == {"image": 0, "video": 0}

    def test_gateway_and_connector_use_the_same_encoders_as_the_same_tenant(self) -> None:
        files = config_files(rendered("vllm"))
        gateway, connector = files[GATEWAY], connector_of(files[LLM])
        assert gateway["encoders"] == connector.encoders == f"kubernetes:{NAMESPACE}/{ENCODER}:grpc"
        assert gateway["tenant"] == connector.tenant == "team"
        for name in ("encoder_ca_file", "encoder_cert_file", "encoder_key_file"):
            assert gateway[name] == str(getattr(connector, name))
        assert gateway["encoder_server_name"] == connector.encoder_server_name

    def test_the_gateway_finds_every_server(self) -> None:
        manifests = rendered("vllm")
        kind, where, port = config_files(manifests)[GATEWAY]["servers"].split(":")
        namespace, name = where.split("/")
        service = of_kind(manifests, "Service")[name]
        assert (kind, namespace) == ("kubernetes", NAMESPACE)
        assert service["spec"]["clusterIP"] == "None"
        assert port in [each["name"] for each in service["spec"]["ports"]]
        assert pods_selected(service["spec"]["selector"], manifests) == {LLM, "demo-vitrine-llm-large"}
        by_dns = config_files(render(values_of("vllm") | {"discovery": "dns"}))[GATEWAY]["servers"]
        assert by_dns == f"dns:demo-vitrine-llm-headless.{NAMESPACE}.svc:8000"

    def test_users_reach_the_gateway_alone(self) -> None:
        services = of_kind(rendered("vllm"), "Service")
        for_users = {name for name, each in services.items() if each["spec"].get("clusterIP") != "None"}
        assert for_users == {GATEWAY}
        assert pods_selected(services[GATEWAY]["spec"]["selector"], rendered("vllm")) == {GATEWAY}

    def test_users_speak_tls_with_the_gateway_and_it_speaks_plainly_with_servers(self) -> None:
        files = config_files(rendered("vllm"))
        assert files[GATEWAY]["tls_client_ca_file"] == "/etc/vitrine/tls/ca.crt"
        assert "ssl_certfile" not in files[LLM]
        assert "server_ca_file" not in files[GATEWAY]
        assert pods("vllm")[LLM].container["readinessProbe"]["httpGet"]["scheme"] == "HTTP"
        monitors = of_kind(rendered("vllm"), "ServiceMonitor")
        schemes = {name: each["spec"]["endpoints"][0].get("scheme") for name, each in monitors.items()}
        assert schemes == {"demo-vitrine-encoder": "https", "demo-vitrine-llm": None, GATEWAY: "https"}

    def test_the_gateway_has_no_gpu_no_model_and_no_token_of_the_hub(self) -> None:
        pod = pods("vllm")[GATEWAY]
        assert pod.container["resources"]["limits"].keys() == {"memory"}
        assert "runtimeClassName" not in pod.spec
        assert "affinity" not in pod.spec
        assert pod.env.keys() == {"VITRINE_GATEWAY_CONFIG"}
        assert {volume["name"] for volume in pod.spec["volumes"]} == {"config", "tmp", "tls", "encoder-tls"}

    def test_the_gateway_may_read_endpoint_slices(self) -> None:
        (binding,) = of_kind(rendered("vllm"), "RoleBinding").values()
        names = {subject["name"] for subject in binding["subjects"]}
        assert names == {pods("vllm")[name].spec["serviceAccountName"] for name in (LLM, GATEWAY)}

    def test_the_gateways_readiness_is_asked_for_with_its_certificate(self) -> None:
        command = pods("vllm")[GATEWAY].container["readinessProbe"]["exec"]["command"]
        assert command[:2] == ["vitrine-health", "localhost:50053"]
        plain = pods_without_tls()[GATEWAY]
        assert plain["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http", "scheme": "HTTP"}
        assert plain["livenessProbe"]["httpGet"]["path"] == "/health"

    def test_a_server_must_have_all_encoders_that_the_gateway_asks(self) -> None:
        with pytest.raises(HelmError, match=r"llm\.pools\.default\.encoderPools: with a gateway"):
            render({"model": "m", "engine": "vllm", "llm": {"pools": {"default": {"encoderPools": ["default"]}}}})

    def test_policies_let_through_what_is_needed(self) -> None:
        policies = {name: each["spec"] for name, each in of_kind(rendered("vllm"), "NetworkPolicy").items()}
        encoder, llm, gateway = (policies[f"demo-vitrine-{name}"] for name in ("encoder", "llm", "gateway"))
        of_encoder, of_llm, of_gateway = ({"podSelector": each["podSelector"]} for each in (encoder, llm, gateway))
        web = {"podSelector": {"matchLabels": {"app": "web"}}}
        assert allowed(gateway["ingress"], 8000, web, "from")
        for server, port, client in ((llm, 8000, of_gateway), (encoder, 50051, of_gateway), (encoder, 50051, of_llm)):
            assert allowed(server["ingress"], port, client, "from")
        for client, port, peer in ((gateway, 8000, of_llm), (gateway, 50051, of_encoder), (llm, 50051, of_encoder)):
            assert allowed(client["egress"], port, peer, "to")
        assert not allowed(llm["ingress"], 8000, web, "from")
        assert not allowed(gateway["ingress"], 8000, STRANGER, "from")
        assert not any("ipBlock" in peer for rule in gateway["egress"] for peer in rule.get("to", [])), "no downloads"
        for policy in (llm, gateway):
            assert allowed(policy["ingress"], 8000, PROMETHEUS, "from")
            assert allowed(policy["ingress"], 8000, NODE, "from")
            assert allowed(policy["egress"], 6443, STRANGER, "to")


def pods_without_tls() -> dict[str, dict[str, Any]]:
    manifests = render({"model": "m", "engine": "vllm"})
    return {
        name: each["spec"]["template"]["spec"]["containers"][0]
        for name, each in of_kind(manifests, "Deployment").items()
    }


class TestModeP:
    """Without a gateway."""

    def test_vllm_has_its_own_tower_and_users_reach_it(self) -> None:
        manifests = rendered("vllm-own-tower")
        (config,) = vllm_files(manifests).values()
        assert config["limit_mm_per_prompt"] == {"image": 4}
        services = of_kind(manifests, "Service")
        assert GATEWAY not in services
        assert pods_selected(services["demo-vitrine-llm"]["spec"]["selector"], manifests) == {LLM}
        (without,) = vllm_files(render({"model": "m", "engine": "vllm", "vllm": {"mode": "P"}})).values()
        assert "limit_mm_per_prompt" not in without

    def test_a_pool_may_use_some_encoders(self) -> None:
        (config,) = vllm_files(rendered("vllm-own-tower")).values()
        assert connector_of(config).encoders == f"dns:demo-vitrine-encoder-large.{NAMESPACE}.svc:50051"

    def test_vllm_serves_with_tls(self) -> None:
        (config,) = vllm_files(rendered("vllm-own-tower")).values()
        assert config["ssl_certfile"] == "/etc/vitrine/tls/tls.crt"
        assert "ssl_cert_reqs" not in config
        values = {
            "model": "m",
            "engine": "vllm",
            "vllm": {"mode": "P"},
            "tls": {"llm": {"secretName": "s", "clientAuth": True}},
        }
        (config,) = vllm_files(render(values)).values()
        assert config["ssl_ca_certs"] == "/etc/vitrine/tls/ca.crt"
        assert config["ssl_cert_reqs"] == 2, "ssl.CERT_REQUIRED"

    def test_users_call_the_model_by_the_name_that_the_notes_say(self) -> None:
        (config,) = vllm_files(rendered("vllm-own-tower")).values()
        assert config["served_model_name"] == "qwen3-vl-8b"
        (config,) = vllm_files(render({"model": "/cache/checkpoint", "engine": "vllm"})).values()
        assert config["served_model_name"] == "checkpoint"


def test_memory_and_gpus_are_shared_as_with_workers() -> None:
    for name in (LLM, "demo-vitrine-llm-large"):
        pod = pods("vllm")[name]
        assert pod.spec["runtimeClassName"] == "nvidia"
        assert pod.env["NVIDIA_VISIBLE_DEVICES"] == "all"
        (term,) = pod.spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "encoder"
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        (mount,) = (each for each in pod.container["volumeMounts"] if each["mountPath"] == "/dev/shm")
        assert volumes[mount["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert pods("vllm")["demo-vitrine-llm-large"].container["resources"]["limits"]["nvidia.com/gpu"] == 2
    colocation = {"enabled": True, "sharedMemoryHostPath": "/dev/shm/vitrine"}
    files = config_files(render({"model": "m", "engine": "vllm", "colocation": colocation}))
    assert connector_of(files[LLM]).shm_folder == files[ENCODER]["shm_folder"] == "/var/run/vitrine/shm"
    assert "shm_folder" not in files[GATEWAY]


def test_pods_start_vllm_with_the_file() -> None:
    container = pods("vllm")[LLM].container
    assert container["image"] == f"{REGISTRY}/vitrine-vllm:0.1.0"
    assert "command" not in container, "the image's entrypoint is vllm serve"
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "config")
    assert container["args"] == ["--config", f"{mount['mountPath']}/config.yaml"]
    assert container["startupProbe"]["failureThreshold"] == 180
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"


def test_servers_are_scaled_by_requests_that_wait() -> None:
    scaler = of_kind(rendered("vllm"), "HorizontalPodAutoscaler")["demo-vitrine-llm-large"]["spec"]
    assert scaler["metrics"][0]["pods"] == {
        "metric": {"name": "vllm:num_requests_waiting"},
        "target": {"type": "AverageValue", "averageValue": "4"},
    }
    (scaled,) = of_kind(rendered("vllm-own-tower"), "ScaledObject").values()
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metadata"]["query"].startswith('sum(vllm:num_requests_waiting{namespace="serving",')
    assert trigger["metadata"]["threshold"] == "2"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "rayservice"}, "engine vllm needs mode deployments"),
        ({"llm": {"pools": {"default": {"role": "decode"}}}}, r"llm\.pools\.default has role decode"),
    ],
)
def test_what_vllm_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render({"model": "m", "engine": "vllm"} | values)
