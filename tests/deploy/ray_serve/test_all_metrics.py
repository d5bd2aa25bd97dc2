"""Pages of several replicas as one page of Prometheus's text format."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from vitrine_vlm.deploy.ray_serve.all_metrics import merged


def page(requests: int) -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ["outcome"], registry=registry).labels("ok").inc(requests)
    Gauge("load", "Load.", registry=registry).set(requests / 10)
    Histogram("seconds", "Seconds.", buckets=[1.0], registry=registry).observe(requests)
    return generate_latest(registry).decode()


def test_each_family_stands_once_with_the_series_of_all_replicas() -> None:
    text = merged([(page(1), {"pod": "a"}), (page(2), {"pod": "b"}), ("", {"pod": "silent"})]).decode()
    assert text.count("# TYPE requests_total counter") == text.count("# TYPE load gauge") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["seconds"].type == "histogram"
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["requests_total", "a", "ok"] == 1 and values["requests_total", "b", "ok"] == 2
    assert values["load", "a"] == 0.1 and values["load", "b"] == 0.2
    assert values["seconds_bucket", "1.0", "a"] == 1 and values["seconds_bucket", "1.0", "b"] == 0
