"""Autoscaling: as many replicas as needed for each to have a given amount of queued work.

Ray Serve calls the policy with averages over the look-back period. It keeps the result within the pool's range, adds
replicas once more have been wanted for upscale_delay_s, and removes some once fewer have been wanted, without a break,
for downscale_delay_s.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

# Replicas are removed only if the others then have at most this part of their target, to avoid oscillation.
_SHRINK_MARGIN = 0.5


class QueuedWork:
    """An autoscaling policy of Ray Serve (`policy_function`; the arguments are its `policy_kwargs`).

    Args:
        stat: the name of the queued work in each replica's record_autoscaling_stats.
        target: the queued work that a replica should have, in the same unit.
    """

    def __init__(self, stat: str, target: float) -> None:
        self._stat = stat
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the number of replicas, before rounding up, and no state."""
        now = context.target_num_replicas
        reports = (context.aggregated_metrics or {}).get(self._stat, {})
        if not reports:  # no replica has reported yet
            return now, {}
        wanted = sum(reports.values()) / self._target
        if wanted > now:
            return wanted, {}
        return min(now, wanted / _SHRINK_MARGIN), {}
