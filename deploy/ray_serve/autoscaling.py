"""Autoscaling: as many replicas as needed for each to have a given amount of queued work, and a given load.

Ray Serve calls the policy with averages over the look-back period. It keeps the result within the pool's range, adds
replicas once more have been wanted for upscale_delay_s, and removes some once fewer have been wanted, without a break,
for downscale_delay_s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# The name of the load in a replica's record_autoscaling_stats.
LOAD = "load"
# Replicas are removed only if the others then have at most this part of their target, to avoid oscillation.
_SHRINK_MARGIN = 0.5
# Of a load, which changes in proportion to their number.
_LOAD_SHRINK_MARGIN = 0.9


class QueuedWork:
    """An autoscaling policy of Ray Serve (`policy_function`; the arguments are its `policy_kwargs`).

    A queue is short however many replicas are idle, so that by the queue alone nearly all would be removed: where there
    is a load, no more are removed than it allows.

    Args:
        stat: the name of the queued work in each replica's record_autoscaling_stats.
        target: the queued work that a replica should have, in the same unit.
        load_stat: likewise the name of the part of time in which a replica computes; empty where there is none.
        target_load: the load that a replica should have.
    """

    def __init__(self, stat: str, target: float, load_stat: str = "", target_load: float = 1.0) -> None:
        self._stat = stat
        self._target = target
        self._load_stat = load_stat
        self._target_load = target_load

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the number of replicas, before rounding up, and no state."""
        now = context.target_num_replicas
        metrics = context.aggregated_metrics or {}
        if not metrics.get(self._stat):  # no replica has reported yet
            return now, {}
        by_queue = _total(metrics, self._stat) / self._target
        by_load = _total(metrics, self._load_stat) / self._target_load
        wanted = max(by_queue, by_load)
        if wanted > now:
            return wanted, {}
        return min(now, max(by_queue / _SHRINK_MARGIN, by_load / _LOAD_SHRINK_MARGIN)), {}


def _total(metrics: Mapping[str, Mapping[Any, float]], stat: str) -> float:
    return sum(metrics.get(stat, {}).values())
