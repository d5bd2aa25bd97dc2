"""Prometheus metrics of an encoder, all named vitrine_encoder_*."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from encoder_service.engine.batcher import BatchReport

_NAMESPACE = "vitrine_encoder"
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PATCH_BUCKETS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_ITEM_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class EncoderMetrics:
    """One registry a process (or a test); counters are public and written where things happen."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "requests", "Encode calls by outcome: ok, cancelled, or an error code.", ["outcome"], **self._where()
        )
        self.items = Counter(
            "items", "Items by kind and outcome: ok, cancelled, or an error code.", ["kind", "outcome"], **self._where()
        )
        self.stage_seconds = Histogram(
            "stage_seconds",
            "Time of one item in a stage (load, open, preprocess, queue, ship), seconds; forward is a whole batch's.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            **self._where(),
        )
        self.batch_patches = Histogram("batch_patches", "Patches in a batch.", buckets=_PATCH_BUCKETS, **self._where())
        self.batch_items = Histogram("batch_items", "Items in a batch.", buckets=_ITEM_BUCKETS, **self._where())

    def observe_batch(self, report: BatchReport) -> None:
        self.batch_patches.observe(report.num_patches)
        self.batch_items.observe(report.num_items)
        self.stage_seconds.labels("forward").observe(report.forward_s)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read anew at each scrape."""
        Gauge(name, help_text, **self._where()).set_function(read)

    def _where(self) -> dict[str, object]:
        return {"namespace": _NAMESPACE, "registry": self.registry}
