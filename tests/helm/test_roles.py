"""Prompts on other pools than answers: who finds whom, who is reached by users, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmError

from tests.helm.rendering import NAMESPACE, of_kind, pods_of, pods_selected, render, rendered
from tests.helm.test_config import config_files
from tests.helm.test_network_policies import allowed
from vitrine_vlm.llm_worker.config import LlmConfig

ROLES = {"default": {"role": "decode"}, "fast": {"role": "prefill"}}


def files(**values: Any) -> dict[str, dict[str, Any]]:
    return config_files(render({"model": "m", "llm": {"pools": ROLES}} | values))


def test_decode_pools_use_prefill_pools_and_no_encoders() -> None:
    found = config_files(rendered("roles"))
    everyone = [f"kubernetes:{NAMESPACE}/demo-vitrine-llm-{pool}:grpc" for pool in ("fast", "slow")]
    assert found["demo-vitrine-llm-default"]["prefill_workers"] == ",".join(everyone)
    assert found["demo-vitrine-llm-short"]["prefill_workers"] == everyone[0]
    for pool, role in (("default", "decode"), ("short", "decode"), ("fast", "prefill"), ("slow", "prefill")):
        config = LlmConfig(**found[f"demo-vitrine-llm-{pool}"])
        assert config.role == role
        assert bool(config.encoders) == (role == "prefill")
    by_dns = files(discovery="dns")["demo-vitrine-llm-default"]["prefill_workers"]
    assert by_dns == f"dns:demo-vitrine-llm-fast.{NAMESPACE}.svc:50052"


def test_without_roles_nothing_is_said_of_them_but_both() -> None:
    (config,) = (each for name, each in config_files(rendered("default")).items() if "-llm-" in name)
    assert config["role"] == "both"
    assert "prefill_workers" not in config


def test_users_reach_those_that_decode_and_everybody_where_nobody_does() -> None:
    services = of_kind(rendered("roles"), "Service")
    for name in ("demo-vitrine-llm", "demo-vitrine-llm-headless"):
        selected = pods_selected(services[name]["spec"]["selector"], rendered("roles"))
        assert selected == {"demo-vitrine-llm-default", "demo-vitrine-llm-short"}
    alone = render({"model": "m", "llm": {"pools": {"default": {"role": "prefill"}}}})
    selector = of_kind(alone, "Service")["demo-vitrine-llm"]["spec"]["selector"]
    assert pods_selected(selector, alone) == {"demo-vitrine-llm-default"}


def test_every_worker_is_scraped_once() -> None:
    manifests = rendered("roles")
    scraped = [
        pod
        for service in of_kind(manifests, "Service").values()
        if service["metadata"]["labels"].get("vitrine/scrape")
        for pod in pods_selected(service["spec"]["selector"], manifests)
    ]
    assert sorted(scraped) == sorted(name for name in pods_of(manifests) if "-llm-" in name)
    alone = render({"model": "m", "llm": {"pools": {"default": {"role": "prefill"}}}})
    labels = [each["metadata"]["labels"] for each in of_kind(alone, "Service").values()]
    assert sum("vitrine/scrape" in each for each in labels) == 1


def test_certificates_are_those_of_who_is_asked() -> None:
    found = config_files(rendered("roles"))
    decode, prefill = found["demo-vitrine-llm-default"], found["demo-vitrine-llm-fast"]
    assert decode["encoder_ca_file"] == "/etc/vitrine/tls/ca.crt"
    assert decode["encoder_server_name"] == f"demo-vitrine-llm.{NAMESPACE}.svc"
    assert (decode["encoder_cert_file"], decode["encoder_key_file"]) == (
        decode["tls_cert_file"],
        decode["tls_key_file"],
    )
    assert prefill["encoder_ca_file"] == "/etc/vitrine/encoder-tls/ca.crt"
    pods = pods_of(rendered("roles"))
    for pool, expected in (("default", {"tls"}), ("fast", {"tls", "encoder-tls"})):
        mounts = {each["name"] for each in pods[f"demo-vitrine-llm-{pool}"].container["volumeMounts"]}
        assert mounts & {"tls", "encoder-tls"} == expected
    plain = files(tls={"encoders": {"secretName": "encoders"}})
    assert "encoder_ca_file" not in plain["demo-vitrine-llm-default"]
    assert "encoder_ca_file" in plain["demo-vitrine-llm-fast"]


def test_pools_in_memory_are_taken_only_where_others_reach_them() -> None:
    apart, together = files(), config_files(rendered("roles"))
    prefill = apart["demo-vitrine-llm-fast"]
    assert (prefill["shm_folder"], prefill["cuda_ipc_pool_bytes"]) == ("", 0)
    assert "cuda_ipc_pool_bytes" not in together["demo-vitrine-llm-fast"]
    for found in (apart, together):
        assert not found["demo-vitrine-llm-default"].keys() & {"shm_folder", "cuda_ipc_pool_bytes"}
    shared = files(colocation={"enabled": True, "sharedMemoryHostPath": "/dev/shm/vitrine"})
    for pool in ROLES:
        assert shared[f"demo-vitrine-llm-{pool}"]["shm_folder"] == "/var/run/vitrine/shm"


def test_decode_pods_go_to_nodes_of_prefill_pods() -> None:
    pods = pods_of(rendered("roles"))
    for pool, component, wanted in (
        ("default", "llm", ["fast", "slow"]),
        ("short", "llm", ["fast"]),
        ("fast", "encoder", ["default"]),
    ):
        affinity = pods[f"demo-vitrine-llm-{pool}"].spec["affinity"]["podAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == component
        assert term["labelSelector"]["matchExpressions"][0]["values"] == wanted


def test_workers_reach_workers_where_some_decode() -> None:
    policy = of_kind(rendered("roles"), "NetworkPolicy")["demo-vitrine-llm"]["spec"]
    itself = {"podSelector": policy["podSelector"]}
    assert allowed(policy["ingress"], 50052, itself, "from")
    assert allowed(policy["egress"], 50052, itself, "to")
    assert not allowed(policy["ingress"], 8000, itself, "from")
    usual = of_kind(render({"model": "m", "networkPolicy": {"enabled": True}}), "NetworkPolicy")
    assert not allowed(usual["demo-vitrine-llm"]["spec"]["egress"], 50052, itself, "to")


@pytest.mark.parametrize(
    ("pools", "reason"),
    [
        ({"default": {"role": "decode"}}, "no pool of role prefill"),
        (ROLES | {"default": {"role": "decode", "prefillPools": ["slow"]}}, "are only fast"),
        ({"default": {"role": "answer"}}, "role"),
        ({"default": {"config": {"role": "prefill"}}}, r"config\.role is not for values: set role of the pool"),
    ],
    ids=["no pool to ask", "not there", "no such role", "past the chart"],
)
def test_what_does_not_go_together_is_refused(pools: dict[str, Any], reason: str) -> None:
    with pytest.raises(HelmError, match=reason):
        render({"model": "m", "llm": {"pools": pools}})


def test_encoders_have_no_roles() -> None:
    with pytest.raises(HelmError):
        render({"model": "m", "encoders": {"pools": {"default": {"role": "prefill"}}}})
