"""An encoder and a worker on one GPU: two processes that share it, or one process that does one thing at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from typing import Any, Literal, TypeAlias, TypeVar, TypeVarTuple, Unpack

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.simulation.costs import GpuCosts
from vitrine_vlm.simulation.encoder import EncoderLimits, SimulatedEncoder
from vitrine_vlm.simulation.network import Link
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.simulation.worker import Outcome, SimulatedWorker, WorkerLimits
from vitrine_vlm.simulation.workload import SimulatedRequest

T = TypeVar("T")
Args = TypeVarTuple("Args")

# apart: a GPU for each half. shared: two processes have one, in time slices or by MPS, and each half of it while both
# compute. line: one process, whose steps and batches stand behind one another.
Sharing: TypeAlias = Literal["apart", "shared", "line"]


# Part of the GPU that is lost while both compute, by the loads of docs/planning.md.
_SHARING_LOSS = 0.12


class SharedGpu:
    """
    busy_s: seconds in which something was computed.
    """

    def __init__(self, loop: VirtualLoop, sharing: Sharing) -> None:
        self.busy_s = 0.0
        self._loop, self._sharing = loop, sharing
        self._left_s: dict[asyncio.Future[None], float] = {}  # seconds that each job still has to compute
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def run(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done once so many seconds of the GPU have been computed."""
        self._advance()
        done: asyncio.Future[None] = self._loop.create_future()
        self._left_s[done] = seconds
        self._schedule()
        return done

    def _rates(self) -> Iterator[tuple[asyncio.Future[None], float]]:
        """The jobs that proceed, and the part of the GPU that each has."""
        if self._sharing == "line":
            first = next(iter(self._left_s), None)
            if first is not None:
                yield first, 1.0
            return
        part = 1.0 if self._sharing == "apart" or len(self._left_s) < 2 else (1.0 - _SHARING_LOSS) / len(self._left_s)
        for each in self._left_s:
            yield each, part

    def _advance(self) -> None:
        now = self._loop.time()
        passed_s, self._since = now - self._since, now
        if self._left_s:
            self.busy_s += passed_s
        for job, part in list(self._rates()):
            self._left_s[job] -= passed_s * part

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        ends = [self._left_s[job] / part for job, part in self._rates()]
        self._timer = self._loop.call_later(max(0.0, min(ends)), self._end) if ends else None

    def _end(self) -> None:
        self._timer = None
        self._advance()
        for job in [job for job, left_s in self._left_s.items() if left_s <= 1e-9]:
            del self._left_s[job]
            if not job.done():
                job.set_result(None)
        self._schedule()


class OneGpuLoop(VirtualLoop):
    """The virtual clock of a host whose executors' work is computed by a shared GPU."""

    gpu: SharedGpu

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Args]], T], *args: *Args
    ) -> asyncio.Future[T]:
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as error:
            self._job_s = 0.0
            future.set_exception(error)
            return future
        took_s, self._job_s = self._job_s, 0.0
        if not took_s:
            future.set_result(result)
            return future
        self.gpu.run(took_s).add_done_callback(lambda _: None if future.done() else future.set_result(result))
        return future


class AllAtOnce(StepGoals):
    """Takes all prompt tokens that a step has room for, as vLLM does."""

    def num_prompt_tokens(self, decoding: object, prefilling: object, now: float) -> int:
        return self._max_tokens


class PlannedWorker(SimulatedWorker):
    """A worker whose steps are computed by a shared GPU."""

    def __init__(
        self,
        loop: OneGpuLoop,
        link: Link,
        limits: WorkerLimits,
        seed: int,
        costs: GpuCosts,
        step_goals: type[StepGoals],
    ) -> None:
        super().__init__(loop, "worker-0", link, limits, seed, costs, step_goals)
        self._gpu = loop.gpu
        self._num_asked = 0

    async def answer(self, request: SimulatedRequest) -> Outcome:
        """Answers a request; the outcome says how."""
        outcome = Outcome(request)
        self._num_asked += 1
        try:
            await self._generate(outcome, self._num_asked)
        except VitrineError as error:
            outcome.end(self._loop.time(), error.code)
        return outcome

    def _compute(self, seconds: float) -> asyncio.Future[None]:
        return self._gpu.run(seconds)


class Host:
    """One encoder and one worker, and the GPUs below them."""

    def __init__(
        self,
        loop: OneGpuLoop,
        sharing: Sharing,
        link: Link,
        costs: GpuCosts,
        *,
        encoder: EncoderLimits,
        worker: WorkerLimits,
        step_goals: type[StepGoals],
        seed: int,
    ) -> None:
        self.loop = loop
        self.gpu = loop.gpu = SharedGpu(loop, sharing)
        self.encoder = SimulatedEncoder(loop, "encoder-0:50051", 0, encoder, seed, costs)
        self.worker = PlannedWorker(loop, link, worker, seed, costs, step_goals)
        self.worker.client.set_addresses([self.encoder.address])
        for peer in self.worker.peers:
            peer.connect(self.encoder)

    async def close(self) -> None:
        await self.worker.close()
        await self.encoder.close()


def on_host(
    sharing: Sharing,
    link: Link,
    costs: GpuCosts,
    work: Callable[[Host], Awaitable[T]],
    *,
    encoder: EncoderLimits | None = None,
    worker: WorkerLimits | None = None,
    step_goals: type[StepGoals] = StepGoals,
    seed: int = 0,
) -> T:
    """What `work` returns, from a virtual clock at 0."""
    loop = OneGpuLoop()  # type: ignore[abstract]  # as `new_virtual_loop`

    async def run() -> T:
        host = Host(
            loop,
            sharing,
            link,
            costs,
            encoder=encoder or EncoderLimits(),
            worker=worker or WorkerLimits(),
            step_goals=step_goals,
            seed=seed,
        )
        try:
            return await work(host)
        finally:
            await host.close()

    main: Coroutine[Any, Any, T] = run()
    return loop.run(main)
