"""Prometheus metrics of API keys, by their names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from vitrine_vlm.service_runtime.logs import harmless

# Every name is a time series. Names come from the operator's file, which may change many times in a process's life.
_MAX_NAMES = 1000
_OTHER = "other"


class KeyMetrics:
    """Counts requests and refusals. Names beyond the first 1000 count as "other"."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        """
        Args:
            prefix: of the names, such as "vitrine_llm".
        """
        self._names: set[str] = set()
        self._requests = Counter(f"{prefix}_key_requests", "Requests by API key.", ["key"], registry=registry)
        self._refusals = Counter(
            f"{prefix}_key_refusals",
            "Refusals by API key and reason: requests, media_bytes, in_flight; of no key no_key, unknown_key.",
            ["key", "reason"],
            registry=registry,
        )

    def count_request(self, name: str) -> None:
        with harmless("a metric of API keys"):
            self._requests.labels(self._bounded(name)).inc()

    def count_refusal(self, name: str, reason: str) -> None:
        with harmless("a metric of API keys"):
            self._refusals.labels(self._bounded(name), reason).inc()

    def _bounded(self, name: str) -> str:
        if name not in self._names:
            if len(self._names) >= _MAX_NAMES:
                return _OTHER
            self._names.add(name)
        return name
