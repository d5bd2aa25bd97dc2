"""Pods of encoders that come and go while requests come, as in a Deployment, and workers that learn of it later."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import cast

from vitrine_vlm.simulation.fleet import START_S, Fleet
from vitrine_vlm.simulation.virtual_loop import VirtualLoop

# The chart's: a pod that ends has left the Services for this long before it drains; then it may drain for this long.
_PRE_STOP_S, _DRAIN_S = 5.0, 30.0
_DRAIN_POLL_S = 0.1
# By how much one start takes longer or shorter than another.
_START_NOISE = 0.1


class Pods:
    """The encoders of a fleet as pods with addresses of their own.

    num_serving: (moment, encoders that the Services have), whenever it has changed.

    Args:
        discovery_s: until workers know of a change, at the latest: they get all that has changed meanwhile in one list.
        start_s: from a pod's creation to SERVING.
    """

    def __init__(self, fleet: Fleet, *, discovery_s: float, start_s: float = START_S, seed: int = 0) -> None:
        self.num_serving = [(0.0, len(fleet.encoders))]
        self._fleet, self._discovery_s, self._start_s = fleet, discovery_s, start_s
        self._loop = cast("VirtualLoop", asyncio.get_running_loop())
        self._rng = random.Random(f"{seed} pods")
        self._ready = list(fleet.encoders)
        self._num_created = 0
        self._known = set(fleet.encoders)  # to the workers
        self._is_changed = False

    def add(self, clock: VirtualLoop | None = None) -> None:
        """A new pod serves. clock: see `Fleet.add`."""
        address = f"new-encoder-{self._num_created}:50051"
        self._fleet.add(address, self._num_created, clock)
        self._num_created += 1
        self._ready.append(address)
        self._publish()

    async def create(self) -> None:
        """Starts a pod; it serves when this returns."""
        await asyncio.sleep(self._start_s * (1 + _START_NOISE * self._rng.uniform(-1, 1)))
        self.add()

    async def delete(self, address: str) -> None:
        """Ends a pod: it leaves the Services, drains and ends."""
        self._ready.remove(address)
        self._publish()
        await asyncio.sleep(_PRE_STOP_S)
        for worker in self._fleet.workers:
            if worker.knows(address) and worker.peer(address).connection is not None:
                worker.peer(address).drain()
        polls = int(_DRAIN_S / _DRAIN_POLL_S)
        while polls and self._fleet.encoders[address].left_behind():
            await asyncio.sleep(_DRAIN_POLL_S)
            polls -= 1
        self._fleet.remove(address)

    def kill(self, addresses: Sequence[str]) -> None:
        """Ends pods at once, without draining; the Services notice now."""
        for address in addresses:
            self._fleet.remove(address)
            self._ready.remove(address)
        self._publish()

    async def roll(self, max_surge: int, max_unavailable: int) -> None:
        """Replaces all pods, as a Deployment's RollingUpdate does.

        Source: Kubernetes, "Deployments", maxSurge and maxUnavailable; pods that end are not counted.
        """
        old, num_pods = list(self._ready), len(self._ready)
        num_new = 0
        jobs: list[asyncio.Task[None]] = []
        starting: set[asyncio.Task[None]] = set()
        while old or starting:
            while old and len(self._ready) > num_pods - max_unavailable:
                jobs.append(self._loop.create_task(self.delete(old[0])))
                await asyncio.sleep(0)  # it has left the Services
                del old[0]
            while num_new < num_pods and len(old) + num_new < num_pods + max_surge:
                starting.add(self._loop.create_task(self.create()))
                num_new += 1
            if starting:
                _, starting = await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*jobs)

    def _publish(self) -> None:
        self.num_serving.append((self._loop.time(), len(self._ready)))
        if not self._is_changed:
            self._is_changed = True
            self._loop.call_later(self._discovery_s, self._discover)

    def _discover(self) -> None:
        """Workers use these pods from now on, and connect to those that are new to them."""
        self._is_changed = False
        addresses = list(self._ready)
        new = [self._fleet.encoders[address] for address in addresses if address not in self._known]
        self._known = set(addresses)
        for worker in self._fleet.workers:
            worker.client.set_addresses(addresses)
            for encoder in new:
                worker.peer(encoder.address).connect(encoder)


class OwnClock:
    """The loop, with a clock that is ahead of the others' by a constant."""

    def __init__(self, loop: VirtualLoop, ahead_s: float) -> None:
        self._loop, self._ahead_s = loop, ahead_s

    def time(self) -> float:
        return self._loop.time() + self._ahead_s

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)
