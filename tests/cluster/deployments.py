"""A Deployment's ReplicaSets and its rolling update.

Source: kubernetes/pkg/controller/deployment/rolling.go and pkg/controller/replicaset/replica_set.go.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from tests.cluster.pods import Pod

_DEFAULT = "25%"


def of_percentage(value: int | str, total: int, *, up: bool) -> int:
    """Returns a number, or a percentage of `total`, rounded up or down."""
    if isinstance(value, int):
        return value
    share = total * int(value.removesuffix("%")) / 100
    return math.ceil(share) if up else math.floor(share)


class Deployment:
    """One Deployment. replicas: how many pods it should have. wanted: of each ReplicaSet, the older ones first."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.name: str = manifest["metadata"]["name"]
        self.wanted: dict[str, int] = {}
        self._templates: dict[str, dict[str, Any]] = {}
        self.apply(manifest)

    def apply(self, manifest: dict[str, Any]) -> None:
        """Takes another version of the manifest, which may be an older one."""
        spec = manifest["spec"]
        text = json.dumps(spec["template"], sort_keys=True)
        self._current = f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self._templates[self._current] = spec["template"]
        self.wanted.setdefault(self._current, 0)
        self.replicas: int = spec.get("replicas", 1)
        rolling = spec.get("strategy", {}).get("rollingUpdate", {})
        self._max_surge = of_percentage(rolling.get("maxSurge", _DEFAULT), self.replicas, up=True)
        self._max_unavailable = of_percentage(rolling.get("maxUnavailable", _DEFAULT), self.replicas, up=False)
        if not self._max_surge and not self._max_unavailable:
            self._max_unavailable = 1

    def reconcile(self, pods: Sequence[Pod]) -> None:
        """Changes `wanted` by one step of a rolling update. pods: all of the namespace."""
        self.wanted = {
            name: wanted
            for name, wanted in self.wanted.items()
            if wanted or name == self._current or _active(pods, name)
        }
        if set(self.wanted) == {self._current}:
            self.wanted[self._current] = self.replicas
            return
        self._scale_new()
        self._scale_old(pods)

    def missing(self, pods: Sequence[Pod]) -> list[str]:
        """Returns the ReplicaSets that lack pods, each as often as it lacks one."""
        return [name for name, wanted in self.wanted.items() for _ in range(wanted - len(_active(pods, name)))]

    def surplus(self, pods: Sequence[Pod]) -> list[Pod]:
        """Returns the pods that are too many: those that are not ready, then the newest."""
        found: list[Pod] = []
        for name, wanted in self.wanted.items():
            active = sorted(_active(pods, name), key=lambda pod: (pod.ready, -pod.created))
            found += active[: max(0, len(active) - wanted)]
        return found

    def template(self, replica_set: str) -> dict[str, Any]:
        return self._templates[replica_set]

    def is_settled(self, pods: Sequence[Pod]) -> bool:
        """Whether all of its pods are of the current template and available, and none is ending."""
        own = [pod for pod in pods if pod.owner.rpartition("-")[0] == self.name]
        current = [pod for pod in own if pod.owner == self._current and pod.is_available]
        return len(own) == len(current) == self.replicas

    def _scale_new(self) -> None:
        new, total = self.wanted[self._current], sum(self.wanted.values())
        if new < self.replicas:
            new += max(0, min(self.replicas + self._max_surge - total, self.replicas - new))
        self.wanted[self._current] = min(new, self.replicas)

    def _scale_old(self, pods: Sequence[Pod]) -> None:
        available = {name: sum(pod.is_available for pod in _active(pods, name)) for name in self.wanted}
        least = self.replicas - self._max_unavailable
        starting = self.wanted[self._current] - available[self._current]
        room = sum(self.wanted.values()) - least - starting
        old = [name for name in self.wanted if name != self._current]
        for name in old:  # first those that are not ready
            ended = max(0, min(room, self.wanted[name] - available[name]))
            self.wanted[name] -= ended
            room -= ended
        excess = sum(available.values()) - least
        for name in old:
            ended = max(0, min(room, excess, self.wanted[name]))
            self.wanted[name] -= ended
            room, excess = room - ended, excess - ended


def _active(pods: Sequence[Pod], replica_set: str) -> list[Pod]:
    return [pod for pod in pods if pod.owner == replica_set and not pod.terminating]
