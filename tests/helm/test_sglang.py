"""`engine: sglang`: unmodified SGLang's servers, and encoders that speak its protocol."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmError

from tests.helm.flags import SGLANG_FLAGS
from tests.helm.rendering import NAMESPACE, REGISTRY, of_kind, pods, pods_selected, render, rendered
from tests.helm.test_config import config_files
from tests.helm.test_network_policies import STRANGER, allowed
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.sglang.receivers import AllowedReceivers
from vitrine_vlm.encoder_service.sglang.registration import parse_servers
from vitrine_vlm.encoder_service.sglang.versions import receiver_class

ENCODER, LLM = "demo-vitrine-encoder-default", "demo-vitrine-llm-default"
REQUIRED = {"model": "m", "engine": "sglang", "sglang": {"receivers": ["10.244.0.0/16"]}}


def test_servers_load_the_language_model_alone() -> None:
    config = config_files(rendered("sglang"))[LLM]
    assert config.keys() - {"mem_fraction_static"} <= SGLANG_FLAGS
    assert config["language_only"] is True
    assert config["encoder_transfer_backend"] == "zmq_to_scheduler"
    assert config["ssl_certfile"] == "/etc/vitrine/tls/tls.crt"


def test_pods_start_sglang_of_the_version_that_encoders_are_set_to() -> None:
    container = pods("sglang")[LLM].container
    version = config_files(rendered("sglang"))[ENCODER]["sglang_version"]
    assert version == "0.5.20"
    assert container["image"] == f"{REGISTRY}/lmsysorg/sglang:v{version}"
    assert container["command"] == ["python3", "-m", "sglang.launch_server"]
    assert container["args"] == ["--config", "/etc/vitrine/config/config.yaml"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http", "scheme": "HTTPS"}
    receiver_class(version)


def test_encoders_register_with_every_server_by_its_pods_name() -> None:
    manifests = rendered("sglang")
    config = EncoderConfig(**config_files(manifests)[ENCODER])
    registered = {str(server.host): server.port for server in parse_servers(config.sglang_register)}
    sets = of_kind(manifests, "StatefulSet")
    services = of_kind(manifests, "Service")
    expected = {
        f"{name}-{number}.{each['spec']['serviceName']}.{NAMESPACE}.svc"
        for name, each in sets.items()
        for number in range(each["spec"]["replicas"])
    }
    assert registered.keys() == expected
    assert len(expected) == 3
    assert set(registered.values()) == {config_files(manifests)[LLM]["encoder_bootstrap_port"]}
    for each in sets.values():
        service = services[each["spec"]["serviceName"]]["spec"]
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True
        assert pods_selected(service["selector"], manifests) == sets.keys()


def test_servers_reach_each_encoder_by_its_pods_address() -> None:
    pod = pods("sglang")[ENCODER]
    assert pod.env["VITRINE_ENCODER_SGLANG_ADVERTISE_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert {"name": "sglang", "containerPort": 30000} in pod.container["ports"]
    assert config_files(rendered("sglang"))[ENCODER]["sglang_port"] == 30000


def test_encoders_send_embeddings_to_the_servers_network_alone() -> None:
    receivers = config_files(rendered("sglang"))[ENCODER]["sglang_receivers"]
    assert receivers == "10.244.0.0/16,fd00:10:244::/56"
    AllowedReceivers(receivers).close()
    with pytest.raises(HelmError, match=r"sglang\.receivers must name the networks of SGLang's pods"):
        render({"model": "m", "engine": "sglang"})


def test_encoders_find_each_other_without_asking_the_api_server() -> None:
    values = REQUIRED | {"encoders": {"pools": {"default": {}, "fast": {}}}}
    config = config_files(render(values))["demo-vitrine-encoder-fast"]
    wanted = [f"dns:demo-vitrine-encoder-{pool}.{NAMESPACE}.svc:50051" for pool in ("default", "fast")]
    assert config["sglang_peers"].split(",") == wanted
    assert not of_kind(render(values), "Role")


def test_ports_are_open_between_servers_and_encoders_alone() -> None:
    policies = of_kind(rendered("sglang"), "NetworkPolicy")
    encoder, llm = (policies[f"demo-vitrine-{name}"]["spec"] for name in ("encoder", "llm"))
    of_encoder, of_llm = ({"podSelector": each["podSelector"]} for each in (encoder, llm))
    web = {"podSelector": {"matchLabels": {"app": "web"}}}
    for port in (8997, 32768):
        assert allowed(llm["ingress"], port, of_encoder, "from")
        assert allowed(encoder["egress"], port, of_llm, "to")
        assert not allowed(llm["ingress"], port, web, "from")
        assert not allowed(llm["ingress"], port, STRANGER, "from")
    (ephemeral,) = (port for rule in llm["ingress"] for port in rule["ports"] if port["port"] == 32768)
    assert ephemeral["endPort"] == 60999
    assert allowed(encoder["ingress"], 30000, of_llm, "from")
    assert allowed(llm["egress"], 30000, of_encoder, "to")
    assert not allowed(encoder["ingress"], 30000, STRANGER, "from")
    assert not allowed(encoder["ingress"], 50051, of_llm, "from")
    assert allowed(encoder["ingress"], 50051, of_encoder, "from")
    assert allowed(encoder["egress"], 50051, of_encoder, "to")
    assert allowed(llm["ingress"], 8000, web, "from")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "rayservice"}, "engine sglang needs mode deployments"),
        ({"colocation": {"enabled": True}}, "leave colocation off"),
        ({"tls": {"encoders": {"secretName": "s"}}}, r"leave tls\.encoders empty"),
        ({"tls": {"llm": {"secretName": "s", "clientAuth": True}}}, r"leave tls\.llm\.clientAuth off"),
        ({"llm": {"defaults": {"autoscaling": {"kind": "hpa"}}}}, "encoders register with a fixed number"),
        ({"llm": {"defaults": {"role": "prefill"}}}, "has role prefill"),
        ({"llm": {"defaults": {"encoderPools": ["default"]}}}, "all servers use all encoders"),
    ],
)
def test_what_sglang_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError, match=message):
        render(REQUIRED | values)
