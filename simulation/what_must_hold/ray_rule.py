"""Ray Serve's rules around the application's policy.

Source: Ray 2.60, ray/serve/autoscaling_policy.py; a test compares this with Ray's own. Ray's control loop runs ten
times a second; here it is asked in every step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from vitrine_vlm.deploy.ray_serve.autoscaling import LOAD, QueuedWork

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from vitrine_vlm.deploy.ray_serve.config import EncoderPool

_QUEUE = "queue_seconds"


class RayAutoscaler:
    """Decides at any moment how many replicas there should be."""

    def __init__(self, pool: EncoderPool) -> None:
        self._pool = pool
        self._policy = QueuedWork(_QUEUE, pool.target_queue_s, LOAD, pool.target_load)
        self._sums: deque[tuple[float, float, float]] = deque()
        self._up_since: float | None = None
        self._down_since: float | None = None

    def decide(self, now: float, num_replicas: int, queues_s: Sequence[float], loads: Sequence[float]) -> int:
        """
        Args:
            num_replicas: all that are wanted now, those that start included.
            queues_s, loads: of the replicas that serve.
        """
        self._sums.append((now, sum(queues_s), sum(loads)))
        while self._sums[0][0] < now - self._pool.look_back_s:
            self._sums.popleft()
        queue_s, load = (sum(each[place] for each in self._sums) / len(self._sums) for place in (1, 2))
        metrics = {_QUEUE: {"all": queue_s}, LOAD: {"all": load}}
        context = SimpleNamespace(target_num_replicas=num_replicas, aggregated_metrics=metrics)
        wanted, _ = self._policy(cast("AutoscalingContext", context))
        return self._delayed(now, num_replicas, math.ceil(wanted))

    def _delayed(self, now: float, num_replicas: int, wanted: int) -> int:
        """The number changes once more, or fewer, have been wanted without a break for the pool's time."""
        wanted = min(max(wanted, self._pool.min_replicas), self._pool.max_replicas)
        if wanted > num_replicas:
            self._down_since = None
            self._up_since = now if self._up_since is None else self._up_since
            if now - self._up_since >= self._pool.upscale_delay_s:
                self._up_since = None
                return wanted
        elif wanted < num_replicas:
            self._up_since = None
            self._down_since = now if self._down_since is None else self._down_since
            if now - self._down_since >= self._pool.downscale_delay_s:
                self._down_since = None
                return wanted
        else:
            self._up_since = self._down_since = None
        return num_replicas
