"""Prometheus metrics of a gateway, named vitrine_gateway_*, and vitrine_build_info."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vitrine_vlm import __version__
from vitrine_vlm.embedding_transport.clients.fleet_client import ClientStats
from vitrine_vlm.errors import InternalError, VitrineError
from vitrine_vlm.gateway.client_stream import ClientStream
from vitrine_vlm.gateway.servers import ServerStatus
from vitrine_vlm.service_runtime.logs import harmless

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Info("vitrine_build", "The version that runs.", registry=self.registry).info({"version": __version__})
        self._requests = Counter(
            "vitrine_gateway_requests",
            "Requests by outcome: ok, cancelled, the server's status from 400 on, or an error code.",
            ["outcome"],
            registry=self.registry,
        )
        self._first_bytes = Histogram(
            "vitrine_gateway_first_bytes_seconds",
            "From a request's arrival to the first bytes of its answer, seconds.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._layouts = Histogram(
            "vitrine_gateway_layouts_seconds",
            "From a request's arrival at the encoders to the layouts of all its media, seconds.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._items = Counter("vitrine_gateway_items", "Images and videos, by kind.", ["kind"], registry=self.registry)
        self._retries = Counter(
            "vitrine_gateway_retries",
            "Requests sent again: their server was lost or busy, or their embeddings were lost.",
            ["reason"],
            registry=self.registry,
        )

    @contextmanager
    def measure_request(self, client: ClientStream) -> Iterator[None]:
        """Measures one request, in flight inside the context, whose answer goes to `client`."""
        outcome = "cancelled"
        try:
            yield
            status = client.response.status if client.response is not None else 0
            outcome = "ok" if status < 400 else str(status)
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client has disconnected
        except Exception as error:
            outcome = error.code if isinstance(error, VitrineError) else InternalError.code
            raise
        finally:
            with harmless("a metric of requests"):
                self._requests.labels(outcome).inc()
                if client.first_bytes_s is not None:
                    self._first_bytes.observe(client.first_bytes_s)

    def retried(self, reason: str) -> None:
        with harmless("a metric of retries"):
            self._retries.labels(reason).inc()

    def measured_items(self, kinds: Iterable[str], seconds: float) -> None:
        """The layouts of a request's items have come after this time."""
        with harmless("a metric of items"):
            self._layouts.observe(seconds)
            for kind in kinds:
                self._items.labels(kind).inc()

    def watch_servers(self, status: Callable[[], list[ServerStatus]]) -> None:
        """Exports the state of the servers; `status` is called at each scrape."""
        self.registry.register(_ServerCollector(status))

    def watch_encoders(self, stats: Callable[[], ClientStats]) -> None:
        """Exports the encoder client's statistics; `stats` is called at each scrape."""
        self.registry.register(_EncoderCollector(stats))


class _ServerCollector(Collector):
    def __init__(self, status: Callable[[], list[ServerStatus]]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        healthy = GaugeMetricFamily("vitrine_gateway_server_healthy", "1 if it is healthy, else 0.", labels=["server"])
        in_flight = GaugeMetricFamily("vitrine_gateway_server_in_flight", "Requests at a server.", labels=["server"])
        for server in self._status():
            healthy.add_metric([server.address], server.healthy)
            in_flight.add_metric([server.address], server.in_flight)
        yield healthy
        yield in_flight


class _EncoderCollector(Collector):
    def __init__(self, stats: Callable[[], ClientStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield CounterMetricFamily("vitrine_gateway_layout_requests", "Items sent to encoders.", stats.requests)
        yield CounterMetricFamily("vitrine_gateway_layout_retries", "Retries on another encoder.", stats.retries)
        yield CounterMetricFamily(
            "vitrine_gateway_layout_moved_items",
            "Items taken to another encoder because theirs announced a far longer time than usual.",
            stats.moved,
        )
