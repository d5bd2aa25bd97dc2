"""The client of the prefill workers: picks one for each prompt, receives its KV, tries another one where it fails."""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from vitrine_vlm.embedding_transport.clients.fleet_client import Exchange, FleetClient
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection, ConnectOptions
from vitrine_vlm.embedding_transport.receiving.event_stream import EventStream
from vitrine_vlm.errors import EncoderUnavailable, Overloaded, PrefillUnavailable, VitrineError
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.prefill.peer import PrefillPeer
from vitrine_vlm.llm_worker.prefill.rpc import prefill_method
from vitrine_vlm.llm_worker.prefill.stream import PrefillEvent, PrefillStream
from vitrine_vlm.llm_worker.prefill.wire import Prefilled, request_to_proto
from vitrine_vlm.service_runtime.logs import harmless
from vitrine_vlm.service_runtime.retry import Attempts, RetryPolicy
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import RowsEvent

# Prompts whose first tokens are equal, this many, go to the same worker, whose prefix cache has them.
_NUM_ROUTED_TOKENS = 256

# The prefill worker or its encoders cannot be reached or shut down, or either has no capacity.
PREFILL_RETRIES = RetryPolicy[VitrineError](elsewhere=(PrefillUnavailable, EncoderUnavailable, Overloaded))

# Where only the KV is needed: the token that comes with it is not used, and not the last.
_ANY_TOKEN = SamplingParams(temperature=0.0)


class PrefillClient(FleetClient[PrefillPeer]):
    """Has prompts computed on one of several prefill workers. Belongs to one event loop.

    Args:
        kv_format: the format that their KV must have.
        merge_size: patches merged into one token along each side.
        timeout_s: for one prompt on one worker.
        max_prompt_tokens: the longest prompt whose KV is accepted.
        on_hand_over: called with the seconds from a first token until its KV can be read here.
        supervisor: owns the loops of this client; None for one of its own. Once a loop has failed, `prefill` fails.
    """

    peer_kind = "prefill_worker"

    def __init__(
        self,
        kv_format: KvFormat,
        options: ConnectOptions,
        *,
        merge_size: int,
        timeout_s: float,
        max_prompt_tokens: int,
        on_hand_over: Callable[[float], None],
        supervisor: Supervisor | None = None,
    ) -> None:
        super().__init__(
            [], lambda address: PrefillPeer(address, options, kv_format), PREFILL_RETRIES, timeout_s, supervisor
        )
        self._format = kv_format
        self._merge_size = merge_size
        self._max_prompt_tokens = max_prompt_tokens
        self._on_hand_over = on_hand_over

    def prefill(
        self, request: GenerationRequest, token_ids: list[int], needs_token: bool, first_row: int = 0
    ) -> AsyncGenerator[PrefillEvent]:
        """Has a prompt computed: yields LayoutEvents (again where a worker was lost), one Prefilled, one RowsEvent.

        There is no RowsEvent where the first token is the last. The caller has to release the KV it receives.

        Args:
            token_ids: the request's prompt, tokenized.
            needs_token: False where only the KV is missing: then there is no Prefilled either.
            first_row: KV rows before it are here already, and are not sent.

        Raises:
            PrefillUnavailable: no prefill worker is left.
            Overloaded: those that are left are overloaded.
            VitrineError: why the prompt cannot be computed.
        """
        self._num_requests += 1
        prompt = _Prompt(request, token_ids, first_row, needs_token, Attempts(self._policy))
        events: EventStream[PrefillEvent] = EventStream(_release)

        async def begin() -> None:
            events.start(partial(self._prefill, prompt, events))

        return events.read(begin)

    async def _prefill(self, prompt: _Prompt, events: EventStream[PrefillEvent]) -> None:
        prefilled_at = 0.0

        async def emit(event: PrefillEvent) -> None:
            nonlocal prefilled_at
            if isinstance(event, Prefilled):
                prefilled_at = time.perf_counter()
                if not prompt.needs_token:
                    return
                prompt.needs_token = False
            await events.emit(event)
            if isinstance(event, RowsEvent):
                with harmless("a metric of hand-overs"):
                    self._on_hand_over(time.perf_counter() - prefilled_at)

        key = await asyncio.to_thread(_routing_key, prompt.request, prompt.token_ids)
        while True:
            peer = self._usable_for(prompt.attempts).choose(key, prompt.attempts.failures)
            peer.in_flight += 1
            try:
                await self._receive(peer, partial(self._begin, prompt, peer), emit)
                return
            except prompt.attempts.elsewhere as error:
                prompt.attempts.failed(peer.address, error)
            finally:
                peer.in_flight -= 1

    async def _begin(
        self, prompt: _Prompt, peer: PrefillPeer, connection: Connection[KvFormat]
    ) -> Exchange[PrefillEvent]:
        request = prompt.request
        if not prompt.needs_token:
            request = replace(request, sampling=_ANY_TOKEN)
        stream = PrefillStream(
            peer,
            connection,
            request,
            self._buffers,
            merge_size=self._merge_size,
            max_prompt_tokens=self._max_prompt_tokens,
            first_row=prompt.first_row,
        )
        message = request_to_proto(
            request, prompt.token_ids, connection.session_id, self._format, prompt.first_row, stream.call_id
        )
        return prefill_method(connection.channel), message, stream

    def _unavailable(self, failures: Mapping[str, VitrineError]) -> PrefillUnavailable:
        return PrefillUnavailable(
            f"no prefill worker is left: {self._reasons(failures)}; start one, or try again later"
        )


@dataclass
class _Prompt:
    """A prompt and what is still needed of it. needs_token: the first token is wanted, and was not yielded yet."""

    request: GenerationRequest
    token_ids: list[int]
    first_row: int
    needs_token: bool
    attempts: Attempts[VitrineError]


def _release(event: PrefillEvent) -> None:
    if isinstance(event, RowsEvent):
        event.rows.release()


def _routing_key(request: GenerationRequest, token_ids: list[int]) -> bytes:
    digest = hashlib.sha256(array("q", token_ids[:_NUM_ROUTED_TOKENS]).tobytes())
    for item in request.media[:1]:
        digest.update(item.content_key)
    return digest.digest()
