"""The file of API keys reaches what users call, and metrics are not where users are."""

from __future__ import annotations

import pytest
from helm_python import HelmRenderError

from tests.helm.rendering import PodTemplate, of_kind, pods, pods_of, render, rendered, values_of
from tests.helm.test_config import config_files
from tests.helm.test_network_policies import PROMETHEUS, allowed, specs
from tests.helm.test_rayservice import arguments

FILE = "/etc/vitrine/keys/keys.yaml"
DECODE, PREFILL, GATEWAY = "demo-vitrine-llm-decode", "demo-vitrine-llm-prefill", "demo-vitrine-gateway"


def mounted(pod: PodTemplate) -> list[str]:
    """Paths of the Secret's files in a pod."""
    (volume,) = (each for each in pod.spec["volumes"] if each["name"] == "keys")
    (mount,) = (each for each in pod.container["volumeMounts"] if each["name"] == "keys")
    assert volume["secret"]["secretName"] == "api-keys"
    return [f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]]


@pytest.mark.parametrize(("values", "called"), [("keys", DECODE), ("vllm-keys", GATEWAY)])
def test_what_users_call_has_the_keys_and_nothing_else(values: str, called: str) -> None:
    files = config_files(rendered(values))
    for name, pod in pods(values).items():
        if name == called:
            assert mounted(pod) == [files[name]["api_keys_file"]] == [FILE]
        else:
            assert "keys" not in [each["name"] for each in pod.spec["volumes"]]
            assert "api_keys_file" not in files.get(name, {})


@pytest.mark.parametrize(("values", "ours"), [("keys", [DECODE, PREFILL]), ("vllm-keys", [GATEWAY])])
def test_metrics_have_a_port_of_their_own_that_prometheus_alone_reaches(values: str, ours: list[str]) -> None:
    for name in ours:
        assert config_files(rendered(values))[name]["metrics_port"] == 9090
        ports = {each["name"]: each["containerPort"] for each in pods(values)[name].container["ports"]}
        assert ports["metrics"] == 9090
    policy = specs(values)["demo-vitrine-llm" if values == "keys" else GATEWAY]
    assert allowed(policy["ingress"], 9090, PROMETHEUS, "from")
    assert [each["from"] for each in policy["ingress"] if {"protocol": "TCP", "port": 9090} in each["ports"]] == [
        [PROMETHEUS]
    ]
    for service in of_kind(rendered(values), "Service").values():
        if service["spec"].get("clusterIP") != "None":
            assert "metrics" not in [each["name"] for each in service["spec"]["ports"]]


def test_without_keys_nothing_of_them_is_there() -> None:
    for name, config in config_files(rendered("default")).items():
        assert "api_keys_file" not in config
        assert ("metrics_port" in config) == ("-encoder-" in name)


def test_in_ray_workers_read_the_file() -> None:
    values = values_of("rayservice") | {"accessKeys": {"secretName": "api-keys"}, "monitoring": {}}
    for pod in pods_of(render(values)).values():
        assert mounted(pod) == [FILE]
    found = arguments(values)
    assert found.llm.settings["api_keys_file"] == FILE
    assert "api_keys_file" not in found.encoders.settings


@pytest.mark.parametrize("values", ["sglang", "vllm-own-tower"])
def test_servers_of_others_take_no_file_of_ours(values: str) -> None:
    with pytest.raises(HelmRenderError, match="keys of their own"):
        render(values_of(values) | {"accessKeys": {"secretName": "api-keys"}})
