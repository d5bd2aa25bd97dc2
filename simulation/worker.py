"""One worker: the product's encoder client, scheduler, step goals and KV cache, over a simulated decoder."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import torch

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.content_routing import load_bound
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan, SamplingParams
from vitrine_vlm.llm_worker.engine.request_parts import SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.scheduler import Scheduler
from vitrine_vlm.llm_worker.engine.step_costs import StepSize
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.simulation.connection import SimulatedPeer
from vitrine_vlm.simulation.costs import IDENTITY, MEASURED, GpuCosts
from vitrine_vlm.simulation.network import Link, Port
from vitrine_vlm.simulation.tower import item_of
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.simulation.workload import SimulatedRequest
from vitrine_vlm.types import LayoutEvent, RowsEvent

_BLOCK_SIZE = 16
# By how much one step differs from another of the same size.
_NOISE = 0.02
# Nothing is computed, so the cache has one head of one element.
_CONFIG = cast("TextConfig", SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=1))
_NO_POSITIONS = torch.empty(3, 0)


@dataclass(frozen=True)
class WorkerLimits:
    """The options of a worker that the simulation knows; the defaults are the product's.

    kv_tokens: slots of the KV cache: 70 GB hold half a million tokens of an 8B model.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 64
    kv_tokens: int = 480_000
    max_model_len: int = 32768
    target_itl_s: float = 0.03
    target_ttft_s: float = 0.5
    encode_timeout_s: float = 300.0


@dataclass(slots=True)
class Outcome:
    """What became of a request. error: the code with which it was refused; None while it runs or once it is done.

    embeddings_at, first_token_at, ended_at: moments, seconds.
    """

    request: SimulatedRequest
    num_answers: int = 0
    num_tokens: int = 0
    error: str | None = None
    embeddings_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None

    def end(self, now: float, error: str | None = None) -> None:
        self.num_answers += 1
        self.ended_at, self.error = now, error


@dataclass(eq=False)
class _Running:
    """A request in the engine. ended: set with its last token."""

    outcome: Outcome
    state: RequestState
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SimulatedWorker:
    """
    num_steps: steps since the start. num_above_bound: items that went to an encoder which had as many in flight already
    as routing allows, although none had failed or was slow.

    Args:
        step_goals: decides how many prompt tokens a step takes.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        name: str,
        link: Link,
        limits: WorkerLimits,
        seed: int,
        costs: GpuCosts = MEASURED,
        step_goals: type[StepGoals] = StepGoals,
    ) -> None:
        self.name = name
        self.num_steps = self.num_above_bound = 0
        self._loop = loop
        self._rng = random.Random(f"{seed} {name}")
        self.port = Port(self._rng)
        self._link = link
        self._peers: dict[str, SimulatedPeer] = {}
        self._supervisor = Supervisor()
        self.client = EncoderClient(
            (),
            IDENTITY,
            encode_timeout_s=limits.encode_timeout_s,
            supervisor=self._supervisor,
            make_peer=self._make_peer,
        )
        self._costs, self._really = costs.step_costs(), costs.step_costs()
        self._cache = KvCache(
            _CONFIG, limits.kv_tokens // _BLOCK_SIZE, _BLOCK_SIZE, torch.device("meta"), torch.bfloat16
        )
        goals = step_goals(self._costs, limits.target_itl_s, limits.target_ttft_s, limits.max_num_batched_tokens)
        self._scheduler = Scheduler(
            self._cache,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            limits.max_model_len,
            goals,
            prefix_cache=False,
            clock=loop.time,
        )
        self._running: dict[RequestState, _Running] = {}
        self._changed = asyncio.Event()
        self._num_requests = 0
        self._supervisor.start_task("engine", self._run_steps())

    @property
    def peers(self) -> list[SimulatedPeer]:
        return list(self._peers.values())

    def peer(self, address: str) -> SimulatedPeer:
        return self._peers[address]

    def knows(self, address: str) -> bool:
        """Whether discovery has ever named the encoder."""
        return address in self._peers

    def _make_peer(self, address: str) -> SimulatedPeer:
        peer = SimulatedPeer(self._loop, address, self.name, self.port, self._link, self._rng, self._check_load)
        self._peers[address] = peer
        return peer

    def _check_load(self, peer: SimulatedPeer) -> None:
        """Compares what this worker has in flight on an encoder, which gets another item, with the bound of routing."""
        assert peer.counted_in is not None
        total = peer.counted_in.total
        # Counting those that can be used takes long, and the bound is lowest where that is all.
        if peer.in_flight < load_bound(total, len(self._peers)):
            return
        stats = self.client.stats()
        if stats.retries or stats.moved:
            return  # those that failed or are slow are passed over, and the others may all be at the bound
        self.num_above_bound += peer.in_flight >= load_bound(total, sum(each.ready for each in self.client.status()))

    async def serve(self, outcome: Outcome) -> None:
        """Answers the outcome's request, and writes down how."""
        self._num_requests += 1
        key = self._num_requests
        try:
            await self._generate(outcome, key)
        except VitrineError as error:
            outcome.end(self._loop.time(), error.code)

    async def close(self) -> None:
        await self._supervisor.close()

    def left_behind(self) -> list[str]:
        """What is not back at zero; nothing, where no request runs."""
        found = {
            "requests": len(self._scheduler.running) + len(self._scheduler.waiting) + len(self._running),
            "KV blocks": self._cache.num_blocks - self._cache.num_free,
            "items in flight": sum(peer.in_flight for peer in self.peers),
            "leases": sum(peer.num_leases for peer in self.peers),
        }
        left = [f"worker {self.name} still has {value} {name}" for name, value in found.items() if value]
        failure = self._supervisor.failure
        return left if failure is None else [*left, f"worker {self.name}: {failure}"]

    async def _generate(self, outcome: Outcome, key: int) -> None:
        """Encoding begins first; the engine has the request once all layouts are known, rows come as they are ready.

        Raises:
            VitrineError: an item could not be encoded, or the prompt is too long.
        """
        request = outcome.request
        state = RequestState(key, str(key), [], SampledTokens(SamplingParams(max_tokens=request.num_generated)))
        running = _Running(outcome, state)
        num_tokens: dict[int, int] = {}
        items = [item_of(picture) for picture in request.pictures]
        try:
            if not items:
                self._submit(running, num_tokens)
            async with aclosing(self.client.encode(items, str(key))) as events:
                async for event in events:
                    if isinstance(event, LayoutEvent):
                        num_tokens[event.item_index] = event.layout.num_tokens
                        if len(num_tokens) == len(items):
                            self._submit(running, num_tokens)
                    elif isinstance(event, RowsEvent):
                        state.receive_embeddings(event.item_index, event.rows)
                        self._changed.set()
            outcome.embeddings_at = self._loop.time()
            await running.ended
        finally:
            self._end(running)

    def _submit(self, running: _Running, num_tokens: dict[int, int]) -> None:
        request, state = running.outcome.request, running.state
        spans: list[MediaSpan] = []
        length = request.num_text // 2
        for item in range(len(num_tokens)):
            spans.append(MediaSpan(item, length, num_tokens[item], 0))
            length += num_tokens[item]
        length += request.num_text - request.num_text // 2
        prompt = ExpandedPrompt([0] * length, _NO_POSITIONS, length, tuple(spans))
        state.set_prompt(prompt, range(len(num_tokens)))
        self._scheduler.limit_length(state)
        self._scheduler.add(state)
        self._running[state] = running
        self._changed.set()

    async def _run_steps(self) -> None:
        """The engine's loop, without overlap: a step's tokens are there when the next one is scheduled."""
        while True:
            chunks = self._scheduler.schedule()
            if not chunks:
                self._changed.clear()
                await self._changed.wait()
                continue
            size, epochs = StepSize.of(chunks), self._loop.time()
            await self._compute(self._really.seconds(size) * (1 + _NOISE * self._rng.uniform(-1, 1)))
            self._costs.observe(size, self._loop.time() - epochs)
            self.num_steps += 1
            for chunk in chunks:
                if chunk.is_current:
                    chunk.request.launch(chunk.stop, chunk.samples)
                    self._scheduler.commit(chunk)
                    if chunk.samples:
                        self._receive_token(self._running[chunk.request])

    def _compute(self, seconds: float) -> asyncio.Future[None]:
        """A future that is done once a step of so many seconds of the GPU has ended."""
        return self._loop.after(seconds)

    def _receive_token(self, running: _Running) -> None:
        outcome, state = running.outcome, running.state
        state.token_arrived()
        state.append_token(0)
        outcome.num_tokens += 1
        if outcome.first_token_at is None:
            outcome.first_token_at = self._loop.time()
        if len(state.token_ids) >= state.max_total_tokens:
            outcome.end(self._loop.time())
            self._end(running)
            running.ended.set_result(None)

    def _end(self, running: _Running) -> None:
        """Releases what the engine has of a request; a second call changes nothing."""
        state = running.state
        if self._running.pop(state, None) is not None:
            self._scheduler.remove(state)
            self._cache.release(state.table)
            self._changed.set()  # its blocks may be what another one waits for
        state.finish()
