"""The fleet: encoders and workers, what connects them, and what goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

from vitrine_vlm.simulation.costs import MEASURED, GpuCosts
from vitrine_vlm.simulation.encoder import EncoderLimits, SimulatedEncoder, Version
from vitrine_vlm.simulation.network import Link
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.simulation.worker import SimulatedWorker, WorkerLimits

FaultKind: TypeAlias = Literal["kill", "hang", "slow", "partition", "link", "bad_deploy", "wrong_checkpoint"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

# gRPC's keepalive, as the product sets it: a ping every ten seconds, which has ten seconds.
_KEEPALIVE_S = (10.0, 20.0)
# From the start of a process to SERVING, as measured.
START_S = 49.0


@dataclass(frozen=True)
class Fault:
    """What happens to encoders.

    kill: the process ends, and another one serves `seconds` and a start later. hang: it neither sends nor receives.
    slow: its tower takes `factor` times as long. partition: it and these workers do not reach each other. link: its
    messages take `factor` times as long, and a part of them is lost and sent again. bad_deploy, wrong_checkpoint: it
    is replaced by a process whose tower fails, or that serves another revision of the checkpoint, and replaced again
    after `seconds`. Except for a kill, all is well again after `seconds`, or in the process that comes next.

    at: seconds from the start. encoders, workers: their numbers. every_s: from one encoder to the next one. loss: part
    of the messages.
    """

    kind: FaultKind
    at: float
    encoders: tuple[int, ...]
    seconds: float = 0.0
    factor: float = 10.0
    workers: tuple[int, ...] = ()
    every_s: float = 0.0
    loss: float = 0.0


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
        costs: GpuCosts = MEASURED,
    ) -> None:
        self._loop, self._limits, self._seed, self._costs = loop, encoder_limits, seed, costs
        self._rng = random.Random(f"{seed} fleet")
        self._addresses = [f"encoder-{number}:50051" for number in range(num_encoders)]
        self._zones = {address: number % num_zones for number, address in enumerate(self._addresses)}
        # How many faults keep a worker and a process from reaching each other.
        self._cuts: Counter[tuple[SimulatedWorker, SimulatedEncoder]] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._clocks: dict[str, VirtualLoop] = {}
        self.ended: list[SimulatedEncoder] = []
        self.encoders: dict[str, SimulatedEncoder] = {}
        self.workers = [
            SimulatedWorker(loop, f"worker-{number}", link, worker_limits, seed, costs) for number in range(num_workers)
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

    def add(self, address: str, zone: int, clock: VirtualLoop | None = None) -> None:
        """A process serves at a new address; workers do not know of it yet.

        Args:
            clock: its own; by default that of all.
        """
        self._zones[address] = zone
        if clock is not None:
            self._clocks[address] = clock
        self._start(address)

    def remove(self, address: str) -> None:
        """The process at an address ends for good; what is in flight on it is lost."""
        self._end_process(self.encoders[address])

    def plan(self, faults: Iterable[Fault]) -> None:
        """Has the faults happen at their moments."""
        for fault in faults:
            for place, number in enumerate(fault.encoders):
                self._loop.call_at(fault.at + place * fault.every_s, self._begin, fault, self._addresses[number])

    async def close(self) -> None:
        """Ends all processes; none has anything in flight."""
        await asyncio.gather(*self._tasks)
        for worker in self.workers:
            await worker.close()
        for encoder in self.encoders.values():
            await encoder.close()

    def _begin(self, fault: Fault, address: str) -> None:
        encoder = self.encoders.get(address)
        if encoder is None:
            return
        later = self._loop.call_later
        if fault.kind == "kill":
            self._end_process(encoder)
            later(fault.seconds + START_S, self._start_again, address)
        elif fault.kind == "hang":
            self._cut_off(encoder, self.workers)
            later(fault.seconds, self._heal, encoder, self.workers)
        elif fault.kind == "partition":
            workers = [self.workers[number] for number in fault.workers]
            self._cut_off(encoder, workers)
            later(fault.seconds, self._heal, encoder, workers)
        elif fault.kind == "slow":
            encoder.tower.factor *= fault.factor
            later(fault.seconds, self._recover, encoder, fault.factor)
        elif fault.kind == "link":
            encoder.port.latency_factor *= fault.factor
            encoder.port.loss += fault.loss
            later(fault.seconds, self._mend_link, encoder, fault)
        else:
            self._replace(address, "broken" if fault.kind == "bad_deploy" else "another checkpoint")
            later(fault.seconds, self._replace, address, "good")

    def _start(self, address: str, version: Version = "good") -> None:
        loop = self._clocks.get(address, self._loop)
        self.encoders[address] = SimulatedEncoder(
            loop, address, self._zones[address], self._limits, self._seed, self._costs, version
        )

    def _start_again(self, address: str) -> None:
        self._start(address)
        self._reconnect(self.encoders[address], self.workers)

    def _replace(self, address: str, version: Version) -> None:
        """Ends the process where another one, which has started meanwhile, serves already."""
        encoder = self.encoders.get(address)
        if encoder is not None:
            self._end_process(encoder)
            self._start(address, version)
            self._reconnect(self.encoders[address], self.workers)

    def _end_process(self, encoder: SimulatedEncoder) -> None:
        del self.encoders[encoder.address]
        self.ended.append(encoder)
        for worker in self.workers:
            self._cuts.pop((worker, encoder), None)
            if worker.knows(encoder.address):
                self._loop.call_later(0.0, worker.peer(encoder.address).lose_process, encoder)
        self._tasks.append(self._loop.create_task(encoder.close()))

    def _cut_off(self, encoder: SimulatedEncoder, workers: Iterable[SimulatedWorker]) -> None:
        """Messages are held back until the keepalive of a connection notices."""
        for worker in workers:
            self._cuts[worker, encoder] += 1
            peer = worker.peer(encoder.address)
            if peer.simulated is not None:
                peer.simulated.cut()
                self._loop.call_later(self._rng.uniform(*_KEEPALIVE_S), peer.lose_cut, peer.simulated)

    def _heal(self, encoder: SimulatedEncoder, workers: Sequence[SimulatedWorker]) -> None:
        if self.encoders.get(encoder.address) is not encoder:
            return
        for worker in workers:
            self._cuts[worker, encoder] -= 1
            peer = worker.peer(encoder.address)
            if not self._cuts[worker, encoder] and peer.simulated is not None:
                peer.simulated.heal()
        self._reconnect(encoder, workers)

    def _recover(self, encoder: SimulatedEncoder, factor: float) -> None:
        encoder.tower.factor /= factor

    def _mend_link(self, encoder: SimulatedEncoder, fault: Fault) -> None:
        encoder.port.latency_factor /= fault.factor
        encoder.port.loss -= fault.loss

    def _reconnect(self, encoder: SimulatedEncoder, workers: Iterable[SimulatedWorker]) -> None:
        def may_connect(worker: SimulatedWorker) -> bool:
            return self.encoders.get(encoder.address) is encoder and not self._cuts[worker, encoder]

        for worker in workers:
            worker.peer(encoder.address).reconnect_later(encoder, partial(may_connect, worker))
