"""Prometheus metrics of an LLM worker, named vitrine_llm_*, and vitrine_build_info."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vitrine_vlm import __version__
from vitrine_vlm.embedding_transport.clients.fleet_client import ClientStats
from vitrine_vlm.embedding_transport.shipping.exporter import ExporterStats
from vitrine_vlm.errors import InternalError, VitrineError
from vitrine_vlm.llm_worker.engine.engine import EngineStats
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, Observe, Started
from vitrine_vlm.service_runtime.access_log import report
from vitrine_vlm.service_runtime.logs import harmless

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_MAX_UNKNOWN_FIELDS = 100
_FIELD_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}", re.ASCII)
_ITL_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class LlmMetrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Info("vitrine_build", "The version that runs.", registry=self.registry).info({"version": __version__})
        self._requests = Counter(
            "vitrine_llm_requests",
            "Requests by outcome: ok, cancelled, or an error code.",
            ["outcome"],
            registry=self.registry,
        )
        self._ttft = Histogram(
            "vitrine_llm_ttft_seconds",
            "From a request's arrival to its first token, seconds.",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self._itl = Histogram(
            "vitrine_llm_itl_seconds",
            "Between the tokens of one request, seconds.",
            buckets=_ITL_BUCKETS,
            registry=self.registry,
        )
        self._stage_seconds = Histogram(
            "vitrine_llm_stage_seconds",
            "Time of a request in a stage (load, preprocess, encode, ship, land, prefill, decode), seconds.",
            ["stage"],
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.kv_hand_over = Histogram(
            "vitrine_llm_kv_hand_over_seconds",
            "From a prefill worker's first token until its KV can be read here, seconds.",
            buckets=_ITL_BUCKETS,
            registry=self.registry,
        )
        self.start_progress = Gauge(
            "vitrine_llm_start_progress",
            "Part of a stage of the start that is done, 0 to 1.",
            ["stage"],
            registry=self.registry,
        )
        self._unused_fields = Counter(
            "vitrine_llm_unused_fields",
            "Requests with a field that changes nothing, by its name and rule: informative, or unknown here.",
            ["field", "rule"],
            registry=self.registry,
        )
        self._unknown_fields: set[str] = set()
        self._tokens = Counter(
            "vitrine_llm_tokens",
            "Tokens of requests by kind: prompt, media (part of prompt), generated.",
            ["kind"],
            registry=self.registry,
        )

    def show_progress(self, stage: str, part: float) -> None:
        self.start_progress.labels(stage).set(part)

    def count_unused_fields(self, informative: Iterable[str], unknown: Iterable[str]) -> None:
        """Counts a request's fields that change nothing; unknown names beyond the first ones count as "other"."""
        for name in informative:
            self._unused_fields.labels(name, "informative").inc()
        for name in {self._bounded(name) for name in unknown}:
            self._unused_fields.labels(name, "unknown").inc()

    def _bounded(self, name: str) -> str:
        """Clients choose the names, and every one is a time series: there are limits to their form and number."""
        if name not in self._unknown_fields:
            if len(self._unknown_fields) >= _MAX_UNKNOWN_FIELDS or not _FIELD_NAME.fullmatch(name):
                return "other"
            self._unknown_fields.add(name)
        return name

    @contextmanager
    def measure_request(self) -> Iterator[Observe]:
        """Measures one request, in flight inside the context; the yielded function is to be called with each event."""
        outcome = "cancelled"
        begin = time.perf_counter()
        previous: dict[int, float] = {}  # when each answer's last token came

        def observe(event: GenerationEvent, answer: int = 0) -> None:
            nonlocal outcome
            if isinstance(event, Finished):
                outcome = "ok"
            with harmless("a metric of events"):
                if isinstance(event, Started):
                    self._tokens.labels("prompt").inc(event.num_prompt_tokens)
                    self._tokens.labels("media").inc(event.num_media_tokens)
                elif isinstance(event, Delta):
                    now = time.perf_counter()
                    latency = self._itl if answer in previous else self._ttft
                    latency.observe(now - previous.get(answer, begin))
                    previous[answer] = now
                    self._tokens.labels("generated").inc(len(event.token_ids))
                elif isinstance(event, Finished):
                    for stage, ms in vars(event.timings).items():
                        if stage != "ttft_ms":
                            self._stage_seconds.labels(stage.removesuffix("_ms")).observe(ms / 1e3)

        try:
            yield observe
        except ConnectionError:
            raise  # the client has disconnected
        except Exception as error:
            if outcome != "ok":
                outcome = error.code if isinstance(error, VitrineError) else InternalError.code
            raise
        finally:
            report(outcome=outcome)
            with harmless("a metric of requests"):
                self._requests.labels(outcome).inc()

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Exports the engine's statistics; `stats` is called at each scrape."""
        self.registry.register(_EngineCollector(stats))

    def watch_encoders(self, stats: Callable[[], ClientStats]) -> None:
        """Exports the encoder client's statistics; `stats` is called at each scrape."""
        self.registry.register(_EncoderCollector(stats))

    def watch_prefill_workers(self, stats: Callable[[], ClientStats]) -> None:
        """Exports the prefill client's statistics; `stats` is called at each scrape."""
        self.registry.register(_PrefillCollector(stats))

    def watch_exporter(self, stats: Callable[[], ExporterStats]) -> None:
        """Exports statistics of the KV that is sent to decode workers; `stats` is called at each scrape."""
        self.registry.register(_ExporterCollector(stats))


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily(
            "vitrine_llm_running", "Requests that hold KV blocks, or wait for their media's sizes.", stats.running
        )
        yield GaugeMetricFamily("vitrine_llm_waiting", "Requests that wait for KV blocks.", stats.waiting)
        yield GaugeMetricFamily(
            "vitrine_llm_load",
            "Computing and waiting requests as a part of --max-num-seqs, or KV blocks as a part of all: the larger.",
            stats.load,
        )
        yield GaugeMetricFamily(
            "vitrine_llm_queued_prefill_tokens", "Prompt tokens that are not computed yet.", stats.queued_prefill_tokens
        )
        yield GaugeMetricFamily("vitrine_llm_kv_blocks_used", "KV blocks in use.", stats.kv_blocks_used)
        yield GaugeMetricFamily(
            "vitrine_llm_kv_blocks_kept",
            "KV blocks that no request uses and whose content can be used again.",
            stats.kv_blocks_kept,
        )
        yield GaugeMetricFamily("vitrine_llm_kv_blocks", "KV blocks in all.", stats.kv_blocks_total)
        yield CounterMetricFamily("vitrine_llm_kv_blocks_evicted", "Kept KV blocks evicted.", stats.kv_blocks_evicted)
        yield CounterMetricFamily(
            "vitrine_llm_preemptions",
            "Preemptions: a request's KV blocks were released, and it was computed again.",
            stats.num_preempted,
        )
        yield CounterMetricFamily(
            "vitrine_llm_cached_tokens", "Prompt tokens whose KV was in the cache.", stats.num_cached_tokens
        )
        yield CounterMetricFamily("vitrine_llm_steps", "Steps of the engine.", stats.num_steps)
        missed = CounterMetricFamily(
            "vitrine_llm_step_goals_missed",
            "Steps predicted to miss --target-itl-ms, or with which a queued prompt misses --target-ttft-ms.",
            labels=["goal"],
        )
        missed.add_metric(["itl"], stats.num_itl_missed)
        missed.add_metric(["ttft"], stats.num_ttft_missed)
        yield missed
        yield GaugeMetricFamily(
            "vitrine_llm_step_cost_correction",
            "How long steps take, as a part of what was measured at start; above 1 where others use the GPU, too.",
            stats.step_cost_correction,
        )
        computed = CounterMetricFamily("vitrine_llm_computed_tokens", "Tokens computed, by phase.", labels=["phase"])
        computed.add_metric(["prefill"], stats.num_prefill_tokens)
        computed.add_metric(["decode"], stats.num_decode_tokens)
        yield computed


class _EncoderCollector(Collector):
    def __init__(self, stats: Callable[[], ClientStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield CounterMetricFamily("vitrine_llm_encode_requests", "Requests sent to encoders.", stats.requests)
        yield CounterMetricFamily("vitrine_llm_encode_retries", "Retries on another encoder.", stats.retries)
        yield CounterMetricFamily(
            "vitrine_llm_encode_moved_items",
            "Items taken to another encoder because theirs announced a far longer time than usual.",
            stats.moved,
        )
        yield CounterMetricFamily(
            "vitrine_llm_transport_fallbacks",
            "Connections that fell back to sending bytes over gRPC.",
            stats.fallbacks,
        )
        received = CounterMetricFamily("vitrine_llm_received_bytes", "Bytes of media embeddings.", labels=["transport"])
        for transport, nbytes in stats.received_nbytes.items():
            received.add_metric([transport], nbytes)
        yield received


class _PrefillCollector(Collector):
    def __init__(self, stats: Callable[[], ClientStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield CounterMetricFamily("vitrine_llm_prefill_requests", "Prompts sent to prefill workers.", stats.requests)
        yield CounterMetricFamily("vitrine_llm_prefill_retries", "Retries on another prefill worker.", stats.retries)
        yield CounterMetricFamily(
            "vitrine_llm_transport_fallbacks",
            "Connections that fell back to sending bytes over gRPC.",
            stats.fallbacks,
        )
        received = CounterMetricFamily("vitrine_llm_kv_received_bytes", "Bytes of KV.", labels=["transport"])
        for transport, nbytes in stats.received_nbytes.items():
            received.add_metric([transport], nbytes)
        yield received


class _ExporterCollector(Collector):
    def __init__(self, stats: Callable[[], ExporterStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily(
            "vitrine_llm_kv_leases_live", "Prompts whose KV decode workers hold.", stats.live_leases
        )
        yield GaugeMetricFamily("vitrine_llm_kv_sessions", "Connected decode workers.", stats.sessions)
        shipped = CounterMetricFamily("vitrine_llm_kv_shipped_bytes", "Bytes of KV.", labels=["transport"])
        for transport, nbytes in stats.shipped_nbytes.items():
            shipped.add_metric([transport], nbytes)
        yield shipped
