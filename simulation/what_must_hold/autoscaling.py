"""An hour in which the work grows from that of ten encoders to that of 500 and back, with each kind of autoscaler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vitrine_vlm.simulation.what_must_hold.chart import Kind, Setting, setting
from vitrine_vlm.simulation.what_must_hold.hpa import SYNC_S, HorizontalPodAutoscaler
from vitrine_vlm.simulation.what_must_hold.pool import STEP_S, Pool
from vitrine_vlm.simulation.what_must_hold.ray_rule import RayAutoscaler

QUEUE, LOAD = "vitrine_encoder_queue_seconds", "vitrine_encoder_load"
_START_S = 50.0
# A pod is as busy as this where the number of pods is what an operator would have set.
_UTILIZATION = 0.7
_MIN_PODS, _MAX_PODS = 10, 600
# An encoder's wait that leaves time for a first token within the goal.
_IN_TIME_S = 0.3
# A number of pods that changes by a smaller part than this, or not much more than the work does, has not turned.
_NOISE = 0.5


@dataclass(frozen=True)
class Ramp:
    """Work for `low` encoders, that grows to `high` and back; each part lasts its seconds."""

    low: int = 10
    high: int = 500
    before_s: float = 300.0
    up_s: float = 600.0
    high_s: float = 900.0
    down_s: float = 600.0
    after_s: float = 1200.0

    @property
    def seconds(self) -> float:
        return self.before_s + self.up_s + self.high_s + self.down_s + self.after_s

    def num_needed(self, now: float) -> float:
        """How many encoders the work of this moment is for."""
        points = np.cumsum([0.0, self.before_s, self.up_s, self.high_s, self.down_s, self.after_s])
        return float(np.interp(now, points, [self.low, self.low, self.high, self.high, self.low, self.low]))


FULL = Ramp()
# Steeper, and with a shorter end: as long as it takes until pods are removed by mistake.
SHORT = Ramp(high=60, before_s=60.0, up_s=240.0, high_s=900.0, down_s=240.0, after_s=900.0)


@dataclass
class Scaled:
    """What came of it, sampled every second.

    in_time: part of the items that an encoder took and that waited less than would cost the goal. num_turns: how often
    pods were taken away and started again although the work had not grown as much. pod_hours: of all
    pods, those that start included.
    """

    kind: Kind
    at: list[float] = field(default_factory=list)
    num_needed: list[float] = field(default_factory=list)
    num_pods: list[int] = field(default_factory=list)
    num_serving: list[int] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    in_time: float = 0.0
    refused: float = 0.0
    num_turns: int = 0
    pod_hours: float = 0.0


def run_scaled(kind: Kind, ramp: Ramp, seed: int = 0, *, by_queue_alone: bool = False) -> Scaled:
    """
    Args:
        by_queue_alone: leaves the load out, to show what it is for.
    """
    chart: Setting = setting(kind)
    autoscaler = chart.autoscaler(_MIN_PODS, _MAX_PODS)
    if by_queue_alone and isinstance(autoscaler, HorizontalPodAutoscaler):
        autoscaler.metrics = [each for each in autoscaler.metrics if each.name == QUEUE]
    pool = Pool(ramp.low, _START_S, np.random.default_rng(seed))
    result = Scaled(kind)
    scraped: dict[str, list[float]] = {}
    sync = round(SYNC_S / STEP_S)
    scrape = round(chart.scrape_s / STEP_S)
    for step in range(round(ramp.seconds / STEP_S)):
        now = step * STEP_S
        pool.step(now, _UTILIZATION * ramp.num_needed(now))
        # The two are not in step with each other in a cluster, either.
        if step % scrape == scrape // 2:
            scraped = {QUEUE: pool.queue_s.tolist(), LOAD: pool.load.tolist()}
        if isinstance(autoscaler, RayAutoscaler):
            loads = [] if by_queue_alone else pool.load.tolist()
            pool.scale_to(autoscaler.decide(now, pool.num_pods, pool.queue_s.tolist(), loads), now)
        elif step % sync == sync - 1:
            pool.scale_to(autoscaler.decide(now, pool.num_pods, scraped), now)
        if step % round(1 / STEP_S) == 0:
            result.at.append(now)
            result.num_needed.append(ramp.num_needed(now))
            result.num_pods.append(pool.num_pods)
            result.num_serving.append(len(pool.queue_s))
            result.wait_s.append(pool.waits[-1][0])
    in_time = sum(number for wait_s, number in pool.waits if wait_s <= _IN_TIME_S)
    result.in_time = in_time / pool.num_items
    result.refused = pool.num_refused / pool.num_items
    result.num_turns = _turns(result.num_pods, result.num_needed)
    result.pod_hours = sum(result.num_pods) / 3600
    return result


def _turns(num_pods: list[int], num_needed: list[float]) -> int:
    """How often pods were taken away and started again, without more work than there was."""
    num_turns, highest, lowest, needed_then, shrinks = 0, num_pods[0], num_pods[0], num_needed[0], False
    for number, needed in zip(num_pods, num_needed, strict=True):
        highest = max(highest, number)
        if number < lowest:
            lowest, needed_then = number, needed
        if not shrinks and number < (1 - _NOISE) * highest:
            shrinks, lowest, needed_then = True, number, needed
        elif shrinks and number > (1 + _NOISE) * lowest * max(1.0, needed / needed_then):
            shrinks, highest = False, number
            num_turns += 1
    return num_turns


def failures(result: Scaled) -> list[str]:
    """What does not hold, in words."""
    shown = f"in time {result.in_time:.3f}, refused {result.refused:.3f}, {result.num_turns} turns"
    found = []
    if result.num_turns > 0:
        found.append(f"{result.kind}: pods were taken away that had to be started again: {shown}")
    if result.in_time < 0.95:
        found.append(f"{result.kind}: fewer than 95 % of items wait less than {_IN_TIME_S:g} s: {shown}")
    if result.num_pods[-1] > 1.5 * result.num_needed[-1]:
        found.append(f"{result.kind}: {result.num_pods[-1]} pods are left for {result.num_needed[-1]:g}")
    return found
