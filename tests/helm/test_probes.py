"""Probes: readiness only after capture, with TLS through the program in the container."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.rendering import VALUES, pods, pods_of, render
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import SERVICE as ENCODER_SERVICE
from vitrine_vlm.llm_worker.frontend.grpc_server import SERVICE as LLM_SERVICE
from vitrine_vlm.service_runtime.health_command import main as vitrine_health

ENCODER, LLM = "demo-vitrine-encoder-default", "demo-vitrine-llm-default"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def test_without_tls_the_kubelet_asks() -> None:
    found = pods("default")
    encoder, llm = found[ENCODER].container, found[LLM].container
    for probe in ("startupProbe", "readinessProbe"):
        assert encoder[probe]["grpc"] == {"port": 50051, "service": ENCODER_SERVICE}
    assert encoder["livenessProbe"]["grpc"] == {"port": 50051}
    assert llm["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http", "scheme": "HTTP"}
    for probe in ("startupProbe", "livenessProbe"):
        assert llm[probe]["httpGet"] == {"path": "/health", "port": "http", "scheme": "HTTP"}


def test_with_tls_the_container_asks() -> None:
    found = pods("server-tls")
    command = ["vitrine-health", "localhost:50051", "--ca-file=/etc/vitrine/tls/ca.crt"]
    assert found[ENCODER].container["livenessProbe"]["exec"]["command"] == command
    for probe in PROBES:
        assert found[LLM].container[probe]["httpGet"]["scheme"] == "HTTPS"


def test_with_certificates_of_clients_nothing_is_asked_without() -> None:
    found = pods("tls")
    for pod, service in ((found[ENCODER], ENCODER_SERVICE), (found[LLM], LLM_SERVICE)):
        command = pod.container["readinessProbe"]["exec"]["command"]
        assert f"--service={service}" in command
        assert "--cert-file=/etc/vitrine/tls/tls.crt" in command
        assert "--key-file=/etc/vitrine/tls/tls.key" in command
        assert not any("httpGet" in pod.container[probe] for probe in PROBES)


@pytest.mark.parametrize("values", ["tls", "server-tls"])
def test_vitrine_health_knows_its_flags(values: str) -> None:
    for pod in pods(values).values():
        for probe in PROBES:
            if command := pod.container[probe].get("exec", {}).get("command"):
                # There are no such files here: it gets as far as reading them.
                assert vitrine_health(command[1:]) == 1


@pytest.mark.parametrize("values", sorted(VALUES.keys() - {"rayservice"}))
def test_ports_of_probes_are_open(values: str) -> None:
    for pod in pods(values).values():
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        for probe in (pod.container[name] for name in PROBES):
            if command := probe.get("exec", {}).get("command"):
                asked: Any = int(command[1].split(":")[1])
            else:
                (asked,) = (probe[how]["port"] for how in ("grpc", "httpGet", "tcpSocket") if how in probe)
            assert asked in ports or asked in ports.values()


@pytest.mark.parametrize(("timeout_s", "failures"), [(1800, 180), (1801, 181), (1, 1)])
def test_start_may_take_its_time(timeout_s: int, failures: int) -> None:
    found = pods_of(render({"model": "m", "encoders": {"defaults": {"startupTimeoutSeconds": timeout_s}}}))
    probe = found[ENCODER].container["startupProbe"]
    assert (probe["periodSeconds"], probe["failureThreshold"]) == (10, failures)
