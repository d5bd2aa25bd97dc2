"""What happens to a release under load: scaled, upgraded, rolled back, drained, and pods that are lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.questions import held_out_questions
from tests.cluster.cluster import Cluster
from tests.cluster.load import Users
from tests.helm.rendering import NAMESPACE, render
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

_SERVICE = "demo-vitrine-llm"
_SETTLE_TIMEOUT_S = 300.0
_NUM_QUESTIONS = 24


@dataclass(frozen=True)
class Event:
    """begin, end: seconds of `time.monotonic`."""

    name: str
    begin: float
    end: float


class Release:
    """The chart with values for this machine, in a cluster. Create it with `installed`.

    events: what has happened, one after the other.
    """

    def __init__(self, cluster: Cluster, values: dict[str, Any]) -> None:
        self.cluster = cluster
        self.events: list[Event] = []
        self._values = values

    @classmethod
    async def installed(cls, cluster: Cluster, values: dict[str, Any]) -> Release:
        release = cls(cluster, values)
        await release._event("install", lambda: release._apply(values))
        return release

    @asynccontextmanager
    async def users(self, count: int, pause_s: float) -> AsyncIterator[Users]:
        """See `Users.asking`."""
        questions = await asyncio.to_thread(held_out_questions, _NUM_QUESTIONS)
        url = f"http://{self.cluster.host(_SERVICE)}:8000"
        async with Users.asking(self.cluster.resolver, url, MODEL_FOLDER.name, questions, count, pause_s) as users:
            yield users

    async def stay(self, seconds: float) -> None:
        """Nothing happens, for comparison."""
        await self._event("nothing", lambda: asyncio.sleep(seconds))

    async def scale_encoders(self, replicas: int) -> None:
        before = len(self.cluster.of_component("encoder"))
        self._values = with_values(self._values, {"encoders": {"defaults": {"replicas": replicas}}})
        await self._event(f"encoders {before} to {replicas}", lambda: self._apply(self._values))

    async def upgrade(self, changes: dict[str, Any]) -> None:
        """Replaces the pods whose settings `changes` change. `roll_back` undoes it."""
        await self._event("rolling upgrade", lambda: self._apply(with_values(self._values, changes)))

    async def fail_to_upgrade(self, changes: dict[str, Any], seconds: float) -> None:
        """An upgrade whose pods never get ready, which stays so for a while."""

        async def apply() -> None:
            self.cluster.apply(render(with_values(self._values, changes)))
            await asyncio.sleep(seconds)

        await self._event("upgrade whose pods do not start", apply)

    async def roll_back(self) -> None:
        """To the values from before the last upgrade."""
        await self._event("rollback", lambda: self._apply(self._values))

    async def drain(self, node: str) -> None:
        async def drain() -> None:
            await self.cluster.drain(node)
            await self.cluster.settle(_SETTLE_TIMEOUT_S)

        await self._event("drain of a node", drain)
        self.cluster.uncordon(node)

    async def lose_pod(self, component: str) -> None:
        async def kill() -> None:
            pod = self.cluster.of_component(component)[0]
            before = pod.num_restarts
            self.cluster.kill(pod)
            while pod.num_restarts == before:
                await asyncio.sleep(0.01)
            await self.cluster.settle(_SETTLE_TIMEOUT_S)

        await self._event(f"{component} pod killed", kill)

    async def _apply(self, values: dict[str, Any]) -> None:
        self.cluster.apply(render(values))
        await asyncio.sleep(0.5)  # so that controllers have begun
        await self.cluster.settle(_SETTLE_TIMEOUT_S)

    async def _event(self, name: str, happen: Callable[[], Awaitable[None]]) -> None:
        begin = time.monotonic()
        await happen()
        self.events.append(Event(name, begin, time.monotonic()))


def values_here(**others: Any) -> dict[str, Any]:
    """Values for the shipped model on CPUs. others: more of them, for pools of both kinds."""
    defaults = {"gpu": {"count": 0}, "env": {"OMP_NUM_THREADS": "1"}} | others
    return {"model": str(MODEL_FOLDER), "encoders": {"defaults": defaults}, "llm": {"defaults": defaults}}


def with_values(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns values as Helm merges several files: maps are merged, all else replaced."""
    merged = dict(values)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = with_values(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


async def run_all(folder: Path, discovery: str, num_users: int, pause_s: float) -> tuple[Release, Users]:
    """Runs the whole story, with all times as rendered."""
    values = with_values(values_here(), {"discovery": discovery, "llm": {"defaults": {"replicas": 2}}})
    async with Cluster.running(NAMESPACE, folder) as cluster:
        release = await Release.installed(cluster, values)
        async with release.users(num_users, pause_s) as users:
            await release.stay(20.0)
            await release.scale_encoders(3)
            await release.scale_encoders(1)
            await release.upgrade({"log": {"level": "debug"}})
            await release.roll_back()
            await release.fail_to_upgrade({"model": "/nowhere"}, 30.0)
            await release.roll_back()
            await release.scale_encoders(2)
            await release.drain("node-a")
            await release.lose_pod("encoder")
            await release.lose_pod("llm")
        return release, users
