"""How many replicas there should be: so many that each has a given amount of queued work.

Ray Serve calls the policy with averages over the look-back period. It keeps the result within the pool's range, adds
replicas once the wish for more has lasted for upscale_delay_s, and takes some away once the wish for fewer has lasted,
without a break, for downscale_delay_s.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

# Fewer replicas only if they would have no more than this part of their target: a queue near it changes nothing.
_SHRINK_MARGIN = 0.5


class QueuedWork:
    """An autoscaling policy of Ray Serve (`policy_function`; the arguments are its `policy_kwargs`).

    Args:
        stat: what each replica's record_autoscaling_stats calls its queued work.
        target: of it per replica, in its unit.
    """

    def __init__(self, stat: str, target: float) -> None:
        self._stat = stat
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas, before rounding up, and no state to keep."""
        now = context.target_num_replicas
        reports = (context.aggregated_metrics or {}).get(self._stat, {})
        if not reports:  # nobody has reported yet
            return now, {}
        wanted = sum(reports.values()) / self._target
        if wanted > now:
            return wanted, {}
        return min(now, wanted / _SHRINK_MARGIN), {}
