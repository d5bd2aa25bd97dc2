"""Who owns the number of a pool's pods, and by which metric."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helm_python import HelmRenderError

from tests.helm.rendering import NAMESPACE, of_kind, render, rendered


def test_by_default_replicas_are_fixed() -> None:
    manifests = rendered("default")
    assert not of_kind(manifests, "HorizontalPodAutoscaler")
    for deployment in of_kind(manifests, "Deployment").values():
        assert deployment["spec"]["replicas"] == 1


@pytest.mark.parametrize(("values", "kind"), [("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")])
def test_who_scales_owns_the_number(values: str, kind: str) -> None:
    manifests = rendered(values)
    scaled = of_kind(manifests, kind)
    for name, deployment in of_kind(manifests, "Deployment").items():
        assert ("replicas" in deployment["spec"]) == (name not in scaled)
    for name, each in scaled.items():
        assert each["spec"]["scaleTargetRef"]["name"] == name
    assert {"demo-vitrine-encoder-default", "demo-vitrine-llm-default"} <= scaled.keys()
    assert "demo-vitrine-llm-fixed" not in scaled


def test_horizontal_pod_autoscalers() -> None:
    scalers = of_kind(rendered("hpa"), "HorizontalPodAutoscaler")
    encoder = scalers["demo-vitrine-encoder-default"]["spec"]
    assert (encoder["minReplicas"], encoder["maxReplicas"]) == (2, 16)
    assert encoder["metrics"][0]["pods"] == {
        "metric": {"name": "vitrine_encoder_queue_seconds"},
        "target": {"type": "AverageValue", "averageValue": "0.5"},
    }
    assert encoder["metrics"][1]["pods"] == {
        "metric": {"name": "vitrine_encoder_load"},
        "target": {"type": "AverageValue", "averageValue": "0.7"},
    }
    assert encoder["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    worker = [each["pods"] for each in scalers["demo-vitrine-llm-default"]["spec"]["metrics"]]
    assert [(each["metric"]["name"], each["target"]["averageValue"]) for each in worker] == [
        ("vitrine_llm_queued_prefill_tokens", "16384"),
        ("vitrine_llm_load", "0.7"),  # long answers fill a worker without a prompt that waits
    ]


def test_decode_pools_do_not_scale_on_what_prefill_pools_have_queued() -> None:
    scaling = {"kind": "hpa", "minReplicas": 1, "maxReplicas": 4}
    pools = {name: {"role": name, "autoscaling": scaling} for name in ("decode", "prefill")}
    scalers = of_kind(render({"model": "m", "llm": {"pools": pools}}), "HorizontalPodAutoscaler")
    metrics = {}
    for name in ("decode", "prefill"):
        [metric] = scalers[f"demo-vitrine-llm-{name}"]["spec"]["metrics"]
        metrics[name] = metric["pods"]
    assert metrics["prefill"]["metric"]["name"] == "vitrine_llm_queued_prefill_tokens"
    assert metrics["decode"]["metric"]["name"] == "vitrine_llm_load"
    assert metrics["decode"]["target"]["averageValue"] == "0.7"


def test_scaled_objects() -> None:
    scalers = of_kind(rendered("keda"), "ScaledObject")
    spec = scalers["demo-vitrine-encoder-default"]["spec"]
    for trigger, threshold in zip(spec["triggers"], ("1", "0.7"), strict=True):
        assert trigger["metadata"]["serverAddress"] == "http://prometheus-operated.monitoring:9090"
        assert trigger["metadata"]["threshold"] == threshold
        assert trigger["authenticationRef"] == {"name": "prometheus"}
    worker = scalers["demo-vitrine-llm-default"]["spec"]
    assert "advanced" not in worker
    queries = [each["metadata"]["query"].partition("{")[0] for each in worker["triggers"]]
    assert queries == ["sum(vitrine_llm_queued_prefill_tokens", "sum(vitrine_llm_load"]


def test_a_pool_may_have_no_pods_where_something_else_starts_the_first() -> None:
    spec = of_kind(rendered("keda"), "ScaledObject")["demo-vitrine-encoder-daytime"]["spec"]
    assert (spec["minReplicaCount"], spec["cooldownPeriod"]) == (0, 300)
    assert [each["type"] for each in spec["triggers"]] == ["cron"]


def test_kedas_query_is_for_pods_of_the_pool() -> None:
    spec = of_kind(rendered("keda"), "ScaledObject")["demo-vitrine-encoder-default"]["spec"]
    metrics = ("vitrine_encoder_queue_seconds", "vitrine_encoder_load")
    for trigger, expected in zip(spec["triggers"], metrics, strict=True):
        match = re.fullmatch(r'sum\((\w+)\{namespace="(.*)",pod=~"(.*)"\}\)', trigger["metadata"]["query"])
        assert match is not None
        metric, namespace, pod = match.groups()
        assert (metric, namespace) == (expected, NAMESPACE)
        assert re.fullmatch(pod, "demo-vitrine-encoder-default-7c9f6d5b4d-x2x7k")
        assert not re.fullmatch(pod, "demo-vitrine-encoder-default-two-7c9f6d5b4d-x2x7k")


def llm(autoscaling: dict[str, Any]) -> dict[str, Any]:
    return {"llm": {"defaults": {"autoscaling": autoscaling}}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoders": {"defaults": {"autoscaling": {"kind": "keda"}}}}, r"keda\.prometheusUrl is required"),
        (
            {"llm": {"defaults": {"autoscaling": {"kind": "hpa", "minReplicas": 0}}}},
            "has no metric that could start one",
        ),
        (
            {"llm": {"defaults": {"autoscaling": {"kind": "keda", "minReplicas": 0}}}},
            "has no metric that could start one",
        ),
        (
            {"llm": {"defaults": {"autoscaling": {"kind": "hpa", "triggers": [{"type": "cron"}]}}}},
            "triggers are KEDA's",
        ),
        ({"llm": {"defaults": {"autoscaling": {"kind": "ray"}}}}, "kind ray of llm pool .* is for mode rayservice"),
    ],
)
def test_autoscalers_need_what_they_need(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmRenderError, match=message):
        render({"model": "m"} | values)
