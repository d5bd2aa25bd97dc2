"""What the services export, read from their own registries, and what rules and dashboards ask for."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

from prometheus_client.metrics import MetricWrapperBase

from vitrine_vlm.embedding_transport.clients.fleet_client import ClientStats
from vitrine_vlm.embedding_transport.pools.leases import LeaseCounts
from vitrine_vlm.embedding_transport.shipping.exporter import ExporterStats
from vitrine_vlm.encoder_service.engine.admission import Admission
from vitrine_vlm.encoder_service.engine.cache import CacheStats
from vitrine_vlm.encoder_service.engine.compute_ahead import AheadStats
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.gpu.stats import GpuStats
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.engine import EngineStats
from vitrine_vlm.llm_worker.metrics import LlmMetrics

TRANSPORTS = {"cuda_ipc": 0, "shm": 0, "grpc": 0}
# Labels of every target, made by Prometheus.
TARGET_LABELS = {"namespace", "pod", "instance", "job"}
_PLACEHOLDER = "?"


@dataclass
class Labels:
    """By label, the values that the service is known to use; empty where they come with what happens."""

    values: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


@cache
def exported() -> dict[str, Labels]:
    """Every time series name of both services, with its labels."""
    series: dict[str, Labels] = defaultdict(Labels)
    for metrics in (_encoder_metrics(), _llm_metrics()):
        for instrument in vars(metrics).values():
            if isinstance(instrument, MetricWrapperBase) and instrument._labelnames:
                instrument.labels(*[_PLACEHOLDER] * len(instrument._labelnames))
        for family in metrics.registry.collect():
            for sample in family.samples:
                for label, value in sample.labels.items():
                    series[sample.name].values[label] |= {value} - {_PLACEHOLDER}
                series[sample.name]  # those without labels, too
    for service in ("encoder", "llm"):
        series[f"vitrine_{service}_requests_total"].values["outcome"] |= {
            "ok",
            "cancelled",
            *_error_codes(VitrineError),
        }
    return dict(series)


def _encoder_metrics() -> EncoderMetrics:
    metrics = EncoderMetrics()
    metrics.watch_queue(Admission(CostModel(0.0, 0.0, 0.0), max_patches=1, max_s=1.0), lambda: 0, lambda: 0)
    metrics.watch_tickets(lambda: 0, lambda: 0, AheadStats)
    metrics.watch_cache(lambda: CacheStats(nbytes={"gpu": 0, "host": 0}))
    metrics.watch_gpu(lambda: GpuStats(0, 0, 0, 0, 0))
    metrics.watch_exporter(lambda: ExporterStats(LeaseCounts(), 0, 0, TRANSPORTS, TRANSPORTS, TRANSPORTS, 0, 0))
    return metrics


def _llm_metrics() -> LlmMetrics:
    metrics = LlmMetrics()
    metrics.watch_engine(lambda: EngineStats(*[0] * len(EngineStats.__dataclass_fields__)))
    metrics.watch_encoders(lambda: ClientStats(0, 0, 0, TRANSPORTS))
    return metrics


def _error_codes(error: type[VitrineError]) -> set[str]:
    return {error.code}.union(*(_error_codes(each) for each in error.__subclasses__()))


_RECORDED = re.compile(r"\b\w+:\w+:\w+\b")
_SELECTED = re.compile(r"\b(vitrine_\w+)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


def problems(expression: str, recorded: set[str]) -> list[str]:
    """Returns the series in a PromQL expression that no service exports.

    Args:
        recorded: names of recording rules.
    """
    found = [f"{name} is not recorded" for name in _RECORDED.findall(expression) if name not in recorded]
    for name, matchers in _SELECTED.findall(_RECORDED.sub("", expression)):
        labels = exported().get(name)
        if labels is None:
            found.append(f"{name} is not exported")
            continue
        for label, operator, value in _MATCHER.findall(matchers):
            known = labels.values.get(label)
            if known is None and label not in TARGET_LABELS:
                found.append(f"{name} has no label {label}")
            elif known:
                alternatives = value.split("|") if "~" in operator else [value]
                found += [f"{name}: {label} is never {each}" for each in alternatives if each not in known]
    return found
