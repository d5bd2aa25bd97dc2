"""Prometheus metrics of an encoder, named vitrine_encoder_*, and vitrine_build_info."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vitrine_vlm import __version__
from vitrine_vlm.embedding_transport.shipping.exporter import ExporterStats
from vitrine_vlm.encoder_service.engine.admission import Admission
from vitrine_vlm.encoder_service.engine.batcher import BatchReport
from vitrine_vlm.encoder_service.engine.cache import CacheStats
from vitrine_vlm.encoder_service.engine.compute_ahead import AheadStats
from vitrine_vlm.encoder_service.engine.tower_load import TowerLoad
from vitrine_vlm.encoder_service.gpu.stats import GpuStats

_STAGES = ("load", "open", "preprocess", "queue", "ship")
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PATCH_BUCKETS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_ITEM_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class EncoderMetrics:
    """One registry a process (or a test). Each part of the encoder counts its own events here."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Info("vitrine_build", "The version that runs.", registry=self.registry).info({"version": __version__})
        self.requests = Counter(
            "vitrine_encoder_requests",
            "Encode calls by outcome: ok, cancelled, or an error code.",
            ["outcome"],
            registry=self.registry,
        )
        self.items = Counter(
            "vitrine_encoder_items",
            "Items by kind and outcome: ok, layout (asked for alone), cancelled, or an error code.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "vitrine_encoder_stage_seconds",
            "Time of one item in a stage (load, open, preprocess, queue, ship), seconds; forward is a whole batch's.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        # Found once, as the library looks each up behind a lock.
        self._stages = {name: self.stage_seconds.labels(name) for name in _STAGES}
        self.batch_patches = Histogram(
            "vitrine_encoder_batch_patches", "Patches in a batch.", buckets=_PATCH_BUCKETS, registry=self.registry
        )
        self.sglang_parts = Counter(
            "vitrine_encoder_sglang_parts",
            "Those of the Encode calls that came from SGLang, by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        self.sglang_bytes = Counter(
            "vitrine_encoder_sglang_bytes", "Bytes of rows pushed to SGLang's receivers.", registry=self.registry
        )
        self.batch_items = Histogram(
            "vitrine_encoder_batch_items", "Items in a batch.", buckets=_ITEM_BUCKETS, registry=self.registry
        )
        self.tower_load = TowerLoad()
        self.start_progress = Gauge(
            "vitrine_encoder_start_progress",
            "How much of a stage of the start is done.",
            ["stage"],
            registry=self.registry,
        )

    def show_progress(self, stage: str, part: float) -> None:
        """Sets which part of a stage of the start is done, 0 to 1."""
        self.start_progress.labels(stage).set(part)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Counts the time of one item in a stage."""
        self._stages[stage].observe(seconds)

    def observe_batch(self, report: BatchReport) -> None:
        """Counts one batch that ran."""
        self.batch_patches.observe(report.num_patches)
        self.batch_items.observe(report.num_items)
        self.stage_seconds.labels("forward").observe(report.forward_s)
        self.tower_load.add(report.forward_s)

    def watch_queue(
        self, admission: Admission, held_bytes: Callable[[], int], waiting_patches: Callable[[], int]
    ) -> None:
        """Reads the queue at each scrape."""
        gauge = self._gauge
        gauge(
            "queue_seconds",
            "Work between admission and the end of shipping, by the cost model.",
            lambda: admission.seconds,
        )
        gauge("load", "Part of the last 30 s in which the tower has computed.", lambda: self.tower_load.value)
        gauge(
            "admitted_patches",
            "Patches of items between admission and the end of shipping.",
            lambda: admission.num_patches,
        )
        gauge("held_media_bytes", "Bytes of requests, media and unread replies in memory.", held_bytes)
        gauge("queue_patches", "Patches ready for the tower that are in no batch yet.", waiting_patches)

    def watch_tickets(
        self, num_live: Callable[[], int], nbytes: Callable[[], int], ahead: Callable[[], AheadStats]
    ) -> None:
        """Reads the tickets at each scrape."""
        self.registry.register(_AheadCollector(ahead))
        self._gauge("tickets_live", "Tickets that can be claimed.", num_live)
        self._gauge("ticket_bytes", "Bytes of media that live tickets hold.", nbytes)

    def watch_sglang(self, held_bytes: Callable[[], int]) -> None:
        """Reads at each scrape what SGLang's requests hold."""
        self._gauge(
            "sglang_held_bytes", "Bytes of SGLang's requests and of rows that wait for their receivers.", held_bytes
        )

    def watch_cache(self, stats: Callable[[], CacheStats]) -> None:
        """Reads the embedding cache at each scrape."""
        self.registry.register(_CacheCollector(stats))

    def watch_gpu(self, stats: Callable[[], GpuStats]) -> None:
        """Reads what the CUDA graphs did at each scrape."""
        self.registry.register(_GpuCollector(stats))

    def watch_exporter(self, stats: Callable[[], ExporterStats]) -> None:
        """Reads leases, pool and shipped bytes at each scrape."""
        self.registry.register(_ExporterCollector(stats))

    def _gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        Gauge(f"vitrine_encoder_{name}", help_text, registry=self.registry).set_function(read)


class _CacheCollector(Collector):
    def __init__(self, stats: Callable[[], CacheStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        lookups = CounterMetricFamily(
            "vitrine_encoder_cache_lookups",
            "Items by where their rows came from: hit (kept), joined (of an equal item in flight), miss.",
            labels=["result"],
        )
        for result, count in (("hit", stats.hits), ("joined", stats.joined), ("miss", stats.misses)):
            lookups.add_metric([result], count)
        yield lookups
        yield CounterMetricFamily("vitrine_encoder_cache_evictions", "Rows that left the cache.", stats.evictions)
        kept = GaugeMetricFamily("vitrine_encoder_cache_bytes", "Bytes of kept rows by tier.", labels=["tier"])
        for tier, nbytes in stats.nbytes.items():
            kept.add_metric([tier], nbytes)
        yield kept


class _AheadCollector(Collector):
    def __init__(self, stats: Callable[[], AheadStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        tickets = CounterMetricFamily(
            "vitrine_encoder_ahead_tickets",
            "Tickets whose rows the tower began before a claim: claimed, or unclaimed at their end.",
            labels=["outcome"],
        )
        for outcome, count in asdict(self._stats()).items():
            tickets.add_metric([outcome], count)
        yield tickets


class _GpuCollector(Collector):
    def __init__(self, stats: Callable[[], GpuStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("vitrine_encoder_cuda_graphs", "CUDA graphs captured.", stats.num_graphs)
        yield GaugeMetricFamily(
            "vitrine_encoder_cuda_graph_bytes", "Memory of graphs and their buffers.", stats.graph_nbytes
        )
        forwards = CounterMetricFamily(
            "vitrine_encoder_gpu_batches", "Batches by how they ran: graph, or eager where too large.", labels=["how"]
        )
        forwards.add_metric(["graph"], stats.num_replayed)
        forwards.add_metric(["eager"], stats.num_eager)
        yield forwards
        yield CounterMetricFamily(
            "vitrine_encoder_padding_patches", "Patches computed to fill graphs up.", stats.num_padding_patches
        )


class _ExporterCollector(Collector):
    def __init__(self, stats: Callable[[], ExporterStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("vitrine_encoder_leases_live", "Leases that peers hold.", stats.live_leases)
        yield GaugeMetricFamily("vitrine_encoder_sessions", "Connected peers.", stats.sessions)
        for name, help_text, nbytes in (
            ("vitrine_encoder_pool_bytes", "Size of an exported pool.", stats.pool_nbytes),
            ("vitrine_encoder_pool_used_bytes", "Bytes of an exported pool in use.", stats.pool_used_nbytes),
        ):
            pools = GaugeMetricFamily(name, help_text, labels=["transport"])
            for transport, value in nbytes.items():
                pools.add_metric([transport], value)
            yield pools
        leases = CounterMetricFamily(
            "vitrine_encoder_leases",
            "Leases granted and how they ended; unknown: releases of leases not held.",
            labels=["event"],
        )
        for event, count in asdict(stats.leases).items():
            leases.add_metric([event], count)
        yield leases
        yield CounterMetricFamily(
            "vitrine_encoder_oversize_items", "Items sent as bytes, larger than the whole pool.", stats.oversize_items
        )
        yield CounterMetricFamily(
            "vitrine_encoder_crowded_items",
            "Items sent as bytes, as other peers' leases left no room.",
            stats.crowded_items,
        )
        shipped = CounterMetricFamily(
            "vitrine_encoder_shipped_bytes", "Bytes of rows by transport.", labels=["transport"]
        )
        for transport, value in stats.shipped_nbytes.items():
            shipped.add_metric([transport], value)
        yield shipped
