"""Network policies let through what is needed, and nothing else."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.helm.rendering import of_kind, pod_templates, pods_selected, render, rendered, values_of

GATEWAY = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
NODE = {"ipBlock": {"cidr": "10.128.0.0/16"}}
STRANGER = {"podSelector": {"matchLabels": {"app": "stranger"}}}


def allowed(rules: list[dict[str, Any]], port: int, peer: dict[str, Any], side: str) -> bool:
    """Whether one of a policy's rules lets `peer` through at `port`; side: "from" or "to"."""
    return any(
        ("ports" not in rule or any(each["port"] == port for each in rule["ports"]))
        and (not rule.get(side) or peer in rule[side])
        for rule in rules
    )


def specs(values: str = "locked-down") -> dict[str, dict[str, Any]]:
    return {name: each["spec"] for name, each in of_kind(rendered(values), "NetworkPolicy").items()}


def test_policies_cover_all_pods() -> None:
    manifests = rendered("locked-down")
    covered = [pods_selected(each["podSelector"]["matchLabels"], manifests) for each in specs().values()]
    assert covered == [{"demo-vitrine-encoder-default"}, {"demo-vitrine-llm-default"}]


def test_workers_reach_encoders() -> None:
    policies = specs()
    encoder, llm = policies["demo-vitrine-encoder"], policies["demo-vitrine-llm"]
    assert allowed(encoder["ingress"], 50051, {"podSelector": llm["podSelector"]}, "from")
    assert allowed(llm["egress"], 50051, {"podSelector": encoder["podSelector"]}, "to")
    assert not allowed(encoder["ingress"], 50051, STRANGER, "from")
    assert not allowed(encoder["egress"], 8000, {"podSelector": llm["podSelector"]}, "to")


def test_the_kubelet_reaches_what_it_probes() -> None:
    policies = specs()
    assert allowed(policies["demo-vitrine-encoder"]["ingress"], 50051, NODE, "from")
    assert allowed(policies["demo-vitrine-llm"]["ingress"], 8000, NODE, "from")


def test_prometheus_reaches_metrics() -> None:
    policies = specs()
    assert allowed(policies["demo-vitrine-encoder"]["ingress"], 9090, PROMETHEUS, "from")
    assert not allowed(policies["demo-vitrine-encoder"]["ingress"], 50051, PROMETHEUS, "from")
    assert allowed(policies["demo-vitrine-llm"]["ingress"], 8000, PROMETHEUS, "from")
    assert not allowed(policies["demo-vitrine-llm"]["ingress"], 50052, PROMETHEUS, "from")


def test_clients_reach_workers() -> None:
    policies = specs()
    for port in (8000, 50052):
        assert allowed(policies["demo-vitrine-llm"]["ingress"], port, GATEWAY, "from")
        assert not allowed(policies["demo-vitrine-llm"]["ingress"], port, STRANGER, "from")
    batch = {"podSelector": {"matchLabels": {"app": "batch"}}}
    assert allowed(policies["demo-vitrine-encoder"]["ingress"], 50051, batch, "from")


def test_no_clients_named_is_everybody() -> None:
    policies = of_kind(render({"model": "m", "networkPolicy": {"enabled": True}}), "NetworkPolicy")
    assert allowed(policies["demo-vitrine-llm"]["spec"]["ingress"], 8000, STRANGER, "from")
    assert not allowed(policies["demo-vitrine-encoder"]["spec"]["ingress"], 50051, STRANGER, "from")


def test_names_are_looked_up_and_the_api_server_asked() -> None:
    policies = specs()
    for policy in policies.values():
        assert allowed(policy["egress"], 53, STRANGER, "to")
        assert allowed(policy["egress"], 4317, PROMETHEUS, "to")
    assert allowed(policies["demo-vitrine-llm"]["egress"], 6443, STRANGER, "to")
    assert not allowed(policies["demo-vitrine-encoder"]["egress"], 6443, STRANGER, "to")


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("151.101.1.1", True),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.20.0.1", False),
        ("192.168.1.1", False),
        ("2a04:4e42::1", True),
        ("fd00:ec2::254", False),
        ("::1", False),
    ],
)
def test_media_come_from_public_addresses(address: str, reached: bool) -> None:
    (rule,) = (
        each
        for each in specs()["demo-vitrine-encoder"]["egress"]
        if any("ipBlock" in peer for peer in each.get("to", []))
    )
    assert [each["port"] for each in rule["ports"]] == [80, 443]
    blocks = [peer["ipBlock"] for peer in rule["to"]]
    assert reached == any(
        ip_address(address) in ip_network(block["cidr"])
        and not any(ip_address(address) in ip_network(each) for each in block["except"])
        for block in blocks
    )


def test_rays_pods_reach_each_other() -> None:
    (policy,) = specs("rayservice").values()
    manifests = rendered("rayservice")
    assert pods_selected(policy["podSelector"]["matchLabels"], manifests) == {
        pod.name for pod in pod_templates(manifests)
    }
    itself = {"podSelector": policy["podSelector"]}
    for port in (6379, 8265, 40000):
        assert allowed(policy["ingress"], port, itself, "from")
        assert allowed(policy["egress"], port, itself, "to")
        assert not allowed(policy["ingress"], port, STRANGER, "from")
    assert allowed(policy["ingress"], 8000, STRANGER, "from")
    assert allowed(policy["ingress"], 8080, PROMETHEUS, "from")


def test_prometheus_reaches_rays_door_although_it_is_no_client() -> None:
    values = values_of("rayservice")
    values["networkPolicy"] |= {"clients": [GATEWAY]}
    (policy,) = of_kind(render(values), "NetworkPolicy").values()
    ingress = policy["spec"]["ingress"]
    assert allowed(ingress, 8000, PROMETHEUS, "from") and not allowed(ingress, 8000, STRANGER, "from")
    assert not allowed(ingress, 9000, PROMETHEUS, "from")
