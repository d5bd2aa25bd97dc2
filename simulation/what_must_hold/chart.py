"""The autoscalers of an encoder pool as the chart sets them: rendered from helm/vitrine, not copied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from helm_python import Chart

from vitrine_vlm.deploy.ray_serve.config import EncoderPool
from vitrine_vlm.simulation.what_must_hold.hpa import DOWN, UP, Direction, HorizontalPodAutoscaler, Metric
from vitrine_vlm.simulation.what_must_hold.ray_rule import RayAutoscaler

CHART = Path(__file__).resolve().parents[2] / "helm" / "vitrine"

Kind: TypeAlias = Literal["hpa", "keda", "ray"]


@dataclass(frozen=True)
class Setting:
    """What the chart makes of one kind. scrape_s: between two readings of the pods' metrics."""

    kind: Kind
    scrape_s: float
    max_queued_s: float = 30.0

    def autoscaler(self, min_pods: int, max_pods: int) -> HorizontalPodAutoscaler | RayAutoscaler:
        """As rendered for a pool of this range."""
        return _autoscaler(self.kind, min_pods, max_pods)


def setting(kind: Kind) -> Setting:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    interval: str = values["monitoring"]["serviceMonitor"]["interval"]
    return Setting(kind, float(interval.removesuffix("s")))


def _autoscaler(kind: Kind, min_pods: int, max_pods: int) -> HorizontalPodAutoscaler | RayAutoscaler:
    scaling = {"kind": kind, "minReplicas": min_pods, "maxReplicas": max_pods}
    values: dict[str, Any] = {"model": "simulated", "encoders": {"defaults": {"autoscaling": scaling}}}
    values["images"] = {"registry": "registry.example.com"}
    if kind == "ray":
        values["mode"] = "rayservice"
        values["ray"] = {"workers": {"minReplicas": min_pods, "maxReplicas": max_pods}}
        served = yaml.safe_load(_rendered(values, "RayService")["spec"]["serveConfigV2"])
        (application,) = served["applications"]
        return RayAutoscaler(EncoderPool(**application["args"]["encoders"]))
    if kind == "keda":
        values["keda"] = {"prometheusUrl": "http://prometheus:9090"}
        spec = _rendered(values, "ScaledObject")["spec"]
        behavior = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
        metrics = [
            Metric(_metric_of(each["metadata"]["query"]), float(each["metadata"]["threshold"]), is_external=True)
            for each in spec["triggers"]
        ]
        return _horizontal(spec["minReplicaCount"], spec["maxReplicaCount"], metrics, behavior)
    spec = _rendered(values, "HorizontalPodAutoscaler")["spec"]
    pods = [each["pods"] for each in spec["metrics"]]
    metrics = [Metric(each["metric"]["name"], float(each["target"]["averageValue"])) for each in pods]
    return _horizontal(spec["minReplicas"], spec["maxReplicas"], metrics, spec.get("behavior", {}))


def _horizontal(
    min_pods: int, max_pods: int, metrics: list[Metric], behavior: dict[str, Any]
) -> HorizontalPodAutoscaler:
    up, down = Direction.of(behavior.get("scaleUp"), UP), Direction.of(behavior.get("scaleDown"), DOWN)
    return HorizontalPodAutoscaler(min_pods, max_pods, metrics, up, down)


def _metric_of(query: str) -> str:
    """The name in a query `sum(NAME{...})`."""
    return query.removeprefix("sum(").partition("{")[0]


@cache
def _chart() -> Chart:
    return Chart.load(CHART)


def _rendered(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """The object of this kind that belongs to the encoders."""
    files = _chart().render(values, name="simulated", namespace="simulated")
    texts = [text for file, text in files.items() if file.endswith(".yaml")]
    objects = [each for text in texts for each in yaml.safe_load_all(text) if each and each["kind"] == kind]
    (found,) = [each for each in objects if kind == "RayService" or "-encoder-" in each["metadata"]["name"]]
    return dict(found)
