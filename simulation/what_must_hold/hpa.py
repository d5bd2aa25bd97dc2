"""The rules of a HorizontalPodAutoscaler, which KEDA uses, too.

Source: Kubernetes, "Horizontal Pod Autoscaling" (algorithm, tolerance, behavior, stabilization window), and
pkg/controller/podautoscaler (replica_calculator.go, horizontal.go), which says how missing metrics count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

SYNC_S = 15.0
_TOLERANCE = 0.1


@dataclass(frozen=True)
class Metric:
    """target: the wanted average of a pod. is_external: its sum counts, as KEDA's does, and not pod by pod."""

    name: str
    target: float
    is_external: bool = False


@dataclass(frozen=True)
class Rate:
    """Pods, or percent of the pods, by which the number may change within a period."""

    value: int
    period_s: float
    is_percent: bool


@dataclass(frozen=True)
class Direction:
    """How fast the number may grow, or shrink. All rates are looked at, and the largest change is allowed."""

    stabilization_s: float
    rates: tuple[Rate, ...]

    @classmethod
    def of(cls, rules: Mapping[str, Any] | None, default: Self) -> Self:
        """The rules of a manifest's `behavior`; what they leave out is Kubernetes' default.

        Raises:
            ValueError: a rule that is not simulated.
        """
        if not rules:
            return default
        if unknown := rules.keys() - {"stabilizationWindowSeconds", "policies"}:
            raise ValueError(f"behavior has {sorted(unknown)}, which the simulation does not know")
        rates = tuple(
            Rate(each["value"], each["periodSeconds"], each["type"] == "Percent") for each in rules.get("policies", ())
        )
        return cls(rules.get("stabilizationWindowSeconds", default.stabilization_s), rates or default.rates)


UP = Direction(0.0, (Rate(4, 15.0, is_percent=False), Rate(100, 15.0, is_percent=True)))
DOWN = Direction(300.0, (Rate(100, 15.0, is_percent=True),))


class HorizontalPodAutoscaler:
    """Decides every SYNC_S seconds how many pods there should be."""

    def __init__(
        self, min_pods: int, max_pods: int, metrics: Sequence[Metric], up: Direction = UP, down: Direction = DOWN
    ) -> None:
        self.metrics = metrics
        self._min, self._max, self._up, self._down = min_pods, max_pods, up, down
        self._wanted: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def decide(self, now: float, num_pods: int, reported: Mapping[str, Sequence[float]]) -> int:
        """
        Args:
            num_pods: all there are, those that start included.
            reported: of each metric, what the pods that serve report.
        """
        wanted = max((_wanted(each, num_pods, reported.get(each.name, ())) for each in self.metrics), default=num_pods)
        number = self._limited(now, num_pods, self._stabilized(now, num_pods, wanted))
        if number != num_pods:
            self._changes.append((now, number - num_pods))
        return number

    def _stabilized(self, now: float, num_pods: int, wanted: int) -> int:
        """No more than the least that was wanted in the window for growing, no fewer than the most in the other."""
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - max(self._up.stabilization_s, self._down.stabilization_s):
            self._wanted.popleft()
        least = min(each for at, each in self._wanted if at >= now - self._up.stabilization_s)
        most = max(each for at, each in self._wanted if at >= now - self._down.stabilization_s)
        return min(max(num_pods, least), most)

    def _limited(self, now: float, num_pods: int, wanted: int) -> int:
        if wanted > num_pods:
            limits = [self._at_begin(now, num_pods, rate) for rate in self._up.rates]
            allowed = max(
                math.ceil(begin * (1 + rate.value / 100)) if rate.is_percent else begin + rate.value
                for begin, rate in zip(limits, self._up.rates, strict=True)
            )
            wanted = min(wanted, max(num_pods, allowed))
        elif wanted < num_pods:
            limits = [self._at_begin(now, num_pods, rate) for rate in self._down.rates]
            allowed = min(
                int(begin * (1 - rate.value / 100)) if rate.is_percent else begin - rate.value
                for begin, rate in zip(limits, self._down.rates, strict=True)
            )
            wanted = max(wanted, min(num_pods, allowed))
        return min(max(wanted, self._min), self._max)

    def _at_begin(self, now: float, num_pods: int, rate: Rate) -> int:
        """How many pods there were when the rate's period began."""
        return num_pods - sum(change for at, change in self._changes if at > now - rate.period_s)


def _wanted(metric: Metric, num_pods: int, reported: Sequence[float]) -> int:
    """How many pods one metric asks for."""
    if not reported:
        return num_pods
    if metric.is_external:
        total = sum(reported)
        is_near = abs(total / (metric.target * num_pods) - 1) <= _TOLERANCE
        return num_pods if is_near else _ceil(total / metric.target)
    ratio = sum(reported) / len(reported) / metric.target
    missing = num_pods - len(reported)
    if not missing:
        return num_pods if abs(ratio - 1) <= _TOLERANCE else _ceil(ratio * num_pods)
    # Pods without a metric count with nothing where more are wanted, and with their target where fewer are.
    total = sum(reported) + (missing * metric.target if ratio < 1 else 0.0)
    with_missing = total / num_pods / metric.target
    if abs(with_missing - 1) <= _TOLERANCE or (ratio < 1) != (with_missing < 1):
        return num_pods
    return _ceil(with_missing * num_pods)


def _ceil(number: float) -> int:
    """Kubernetes counts in thousandths: 5.0000000001 pods are five."""
    return math.ceil(round(number, 6))
