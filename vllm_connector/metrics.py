"""The connector's metrics in vLLM's own /metrics.

The scheduler's side reports through vLLM's statistics of a step; the process of the API server observes the reports.
vLLM has these hooks from 0.31 on, so this module cannot be imported with an older one.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

from vitrine_vlm.vllm_connector.stats import Outcome, Report, merge_reports

_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TRANSPORTS = ("cuda_ipc", "shm", "grpc")


class ConnectorStats(ECConnectorStats):
    """A report of `stats.StatsCollector` as vLLM carries it. `data` is empty or a report."""

    def reset(self) -> None:
        self.data: Report = {}

    def aggregate(self, other: ECConnectorStats) -> ECConnectorStats:
        if self.is_empty() or other.is_empty():
            return other if self.is_empty() else self
        return ConnectorStats(merge_reports(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        seconds = self.data["seconds"]
        mean = {"mean seconds until landed": round(sum(seconds) / len(seconds), 4)} if seconds else {}
        return {**self.data["items"], **mean}

    def is_empty(self) -> bool:
        return not self.data


class ConnectorMetrics(ECConnectorPromMetrics):
    """Registers the metrics, and observes reports. Labels are vLLM's own (model_name, engine) and those named here."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        items = self._counter_cls(
            name="vitrine:connector_items",
            documentation="Images and videos by outcome: delivered, own_tower, failed or cancelled.",
            labelnames=[*labelnames, "outcome"],
        )
        nbytes = self._counter_cls(
            name="vitrine:connector_received_bytes",
            documentation="Bytes of rows that have landed in each worker, by transport.",
            labelnames=[*labelnames, "transport"],
        )
        seconds = self._histogram_cls(
            name="vitrine:connector_landing_seconds",
            documentation="Time from the request for an item until its rows had landed in all workers.",
            buckets=_SECONDS_BUCKETS,
            labelnames=labelnames,
        )
        landed = self._gauge_cls(
            name="vitrine:connector_landed_bytes",
            documentation="Bytes in each worker of rows that are landing, or that requests still need.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )
        engines = per_engine_labelvalues.items()
        # All series exist from the start: a rate over a counter that appears with its first event misses this event.
        self._items = {
            (engine, each.value): items.labels(*values, each.value) for engine, values in engines for each in Outcome
        }
        self._nbytes = {
            (engine, each): nbytes.labels(*values, each) for engine, values in engines for each in _TRANSPORTS
        }
        self._seconds = {engine: seconds.labels(*values) for engine, values in engines}
        self._landed = {engine: landed.labels(*values) for engine, values in engines}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for outcome, count in transfer_stats_data["items"].items():
            self._items[engine_idx, outcome].inc(count)
        for transport, nbytes in transfer_stats_data["nbytes"].items():
            self._nbytes[engine_idx, transport].inc(nbytes)
        for seconds in transfer_stats_data["seconds"]:
            self._seconds[engine_idx].observe(seconds)
        self._landed[engine_idx].set(transfer_stats_data["landed_nbytes"])
