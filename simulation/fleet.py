"""The fleet: encoders and workers, what connects them, and what goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vitrine_vlm.simulation.encoder import EncoderLimits, SimulatedEncoder
from vitrine_vlm.simulation.network import Link
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.simulation.worker import SimulatedWorker, WorkerLimits

FaultKind: TypeAlias = Literal["kill", "hang", "slow"]

# gRPC's keepalive, as the product sets it: a ping every ten seconds, which has ten seconds.
_KEEPALIVE_S = (10.0, 20.0)
# From the start of a process to SERVING, as measured.
START_S = 49.0


@dataclass(frozen=True)
class Fault:
    """What happens to encoders. A killed one starts again; one that hangs, or is cut off, goes on at the end.

    encoders: their numbers. at: seconds from the start; seconds: until the process is started again, or it ends.
    factor: by which a slow tower takes longer.
    """

    kind: FaultKind
    at: float
    encoders: tuple[int, ...]
    seconds: float = 0.0
    factor: float = 10.0


class Fleet:
    """
    encoders: the processes that run now, by address. ended: those that have ended.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        *,
        num_encoders: int,
        num_workers: int,
        num_zones: int,
        link: Link,
        encoder_limits: EncoderLimits,
        worker_limits: WorkerLimits,
        seed: int,
    ) -> None:
        self._loop, self._limits, self._seed = loop, encoder_limits, seed
        self._rng = random.Random(f"{seed} fleet")
        self._addresses = [f"encoder-{number}:50051" for number in range(num_encoders)]
        self._zones = {address: number % num_zones for number, address in enumerate(self._addresses)}
        self._cut: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.ended: list[SimulatedEncoder] = []
        self.encoders: dict[str, SimulatedEncoder] = {}
        self.workers = [
            SimulatedWorker(loop, f"worker-{number}", link, worker_limits, seed) for number in range(num_workers)
        ]
        for worker in self.workers:
            worker.client.set_addresses(self._addresses)
        for address in self._addresses:
            self._start(address)
        for worker in self.workers:
            for peer in worker.peers:
                peer.connect(self.encoders[peer.address])

    @property
    def all_encoders(self) -> list[SimulatedEncoder]:
        """Also those that have ended."""
        return [*self.ended, *self.encoders.values()]

    def left_behind(self) -> list[str]:
        """What the processes have not released; nothing, where no request is in flight."""
        of_workers = [each for worker in self.workers for each in worker.left_behind()]
        return of_workers + [each for encoder in self.all_encoders for each in encoder.left_behind()]

    def plan(self, faults: Iterable[Fault]) -> None:
        """Has the faults happen at their moments."""
        for fault in faults:
            addresses = [self._addresses[number] for number in fault.encoders]
            self._loop.call_at(fault.at, self._begin, fault, addresses)

    async def close(self) -> None:
        """Ends all processes; none has anything in flight."""
        await asyncio.gather(*self._tasks)
        for worker in self.workers:
            await worker.close()
        for encoder in self.encoders.values():
            await encoder.close()

    def _begin(self, fault: Fault, addresses: list[str]) -> None:
        for address in addresses:
            encoder = self.encoders.get(address)
            if encoder is None:
                continue
            if fault.kind == "kill":
                self._kill(encoder)
                self._loop.call_later(fault.seconds + START_S, self._start_again, address)
            elif fault.kind == "hang":
                self._cut_off(encoder)
                self._loop.call_later(fault.seconds, self._heal, encoder)
            else:
                encoder.tower.factor *= fault.factor
                self._loop.call_later(fault.seconds, self._recover, encoder, fault.factor)

    def _start(self, address: str) -> None:
        self.encoders[address] = SimulatedEncoder(self._loop, address, self._zones[address], self._limits, self._seed)

    def _start_again(self, address: str) -> None:
        self._start(address)
        self._reconnect(self.encoders[address])

    def _kill(self, encoder: SimulatedEncoder) -> None:
        del self.encoders[encoder.address]
        self._cut.discard(encoder.address)
        self.ended.append(encoder)
        for worker in self.workers:
            peer = worker.peer(encoder.address)
            self._loop.call_later(0.0, peer.lose_process, encoder)
        self._tasks.append(self._loop.create_task(encoder.close()))

    def _cut_off(self, encoder: SimulatedEncoder) -> None:
        """Messages are held back until the keepalive of a connection notices."""
        self._cut.add(encoder.address)
        for worker in self.workers:
            peer = worker.peer(encoder.address)
            if peer.simulated is not None:
                peer.simulated.cut()
                self._loop.call_later(self._rng.uniform(*_KEEPALIVE_S), peer.lose_cut, peer.simulated)

    def _heal(self, encoder: SimulatedEncoder) -> None:
        if self.encoders.get(encoder.address) is not encoder:
            return
        self._cut.discard(encoder.address)
        for worker in self.workers:
            peer = worker.peer(encoder.address)
            if peer.simulated is not None:
                peer.simulated.heal()
        self._reconnect(encoder)

    def _recover(self, encoder: SimulatedEncoder, factor: float) -> None:
        encoder.tower.factor /= factor

    def _reconnect(self, encoder: SimulatedEncoder) -> None:
        def may_connect() -> bool:
            return self.encoders.get(encoder.address) is encoder and encoder.address not in self._cut

        for worker in self.workers:
            worker.peer(encoder.address).reconnect_later(encoder, may_connect)
