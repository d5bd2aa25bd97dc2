"""The client of the prefill workers: picks one for each prompt, takes its KV in, goes on elsewhere if it dies."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

import grpc

from embedding_transport.chunk_codec import parse_response
from embedding_transport.content_routing import ranked
from embedding_transport.encoder_client import ClientStats
from embedding_transport.errors import EncoderUnavailable, Overloaded, PrefillUnavailable
from embedding_transport.grpc_status import error_from_rpc
from embedding_transport.peer_fleet import PeerFleet
from embedding_transport.received_rows import HostBufferPool, LeasedRows
from embedding_transport.row_peer import ConnectOptions
from embedding_transport.types import RowsEvent
from llm_worker.engine.request import SamplingParams
from llm_worker.frontend.events import GenerationRequest
from llm_worker.prefill.kv_format import KvFormat
from llm_worker.prefill.peer import PrefillPeer
from llm_worker.prefill.receiver import PrefillEvent, PrefillReceiver
from llm_worker.prefill.rpc import prefill_method
from llm_worker.prefill.wire import Prefilled, request_to_proto
from protos.prefill.v1 import prefill_pb2
from service_runtime.cancellation import is_own_cancellation
from service_runtime.traces import outgoing_metadata

# Prompts that begin alike go to the same worker, whose prefix cache knows them: so many of their tokens decide.
_NUM_ROUTED_TOKENS = 256

# For KV alone: whatever token comes with it, it is not the last.
_ANY_TOKEN = SamplingParams(temperature=0.0)


class PrefillClient(PeerFleet[PrefillPeer]):
    """Has prompts computed on one of several prefill workers. Make and use it on one event loop.

    Args:
        kv_format: what their rows must be.
        merge_size: patches merged into one token along each side.
        timeout_s: for one prompt on one worker.
        max_prompt_tokens: the longest prompt whose KV is taken in.
        on_hand_over: called with the seconds from a first token to its KV being readable here.
    """

    def __init__(
        self,
        kv_format: KvFormat,
        options: ConnectOptions,
        *,
        merge_size: int,
        timeout_s: float,
        max_prompt_tokens: int,
        on_hand_over: Callable[[float], None],
    ) -> None:
        super().__init__([], lambda address: PrefillPeer(address, options, kv_format))
        self._format = kv_format
        self._merge_size = merge_size
        self._timeout_s = timeout_s
        self._max_prompt_tokens = max_prompt_tokens
        self._on_hand_over = on_hand_over
        self._buffers = HostBufferPool()
        self._num_requests = 0
        self._num_retries = 0
        self._received_nbytes = {"cuda_ipc": 0, "shm": 0, "grpc": 0}

    def stats(self) -> ClientStats:
        return ClientStats(self._num_requests, self._num_retries, self.num_fallbacks, dict(self._received_nbytes))

    async def prefill(
        self, request: GenerationRequest, token_ids: list[int], needs_token: bool, first_row: int = 0
    ) -> AsyncGenerator[PrefillEvent]:
        """Computes a prompt: yields LayoutEvents, again where a worker was lost, one Prefilled, one RowsEvent with KV.

        There is no RowsEvent where the first token is the last. The caller owns the rows it was given.

        Args:
            token_ids: the request's prompt, tokenized.
            needs_token: False where only the KV is missing: then there is no Prefilled either.
            first_row: the KV of the tokens before it is here, and is not sent.

        Raises:
            PrefillUnavailable: no prefill worker is left.
            Overloaded: those that are left are overloaded.
            VitrineError: why the request cannot be computed.
        """
        self._num_requests += 1
        key = await asyncio.to_thread(_routing_key, request, token_ids)
        lost: dict[str, str] = {}
        overloaded: list[Overloaded] = []
        while True:
            if not needs_token:
                request = replace(request, sampling=_ANY_TOKEN)
            await self._until_tried()
            peer = self._choose(key, lost, overloaded)
            peer.in_flight += 1
            try:
                async with aclosing(self._prefill_on(peer, request, token_ids, first_row)) as events:
                    async for event in events:
                        if not isinstance(event, Prefilled):
                            yield event
                        elif needs_token:
                            needs_token = False
                            yield event
                return
            except _WorkerLost as error:
                lost[peer.address] = f"prefill worker {peer.address} was lost: {error}"
            except Overloaded as error:
                lost[peer.address] = f"prefill worker {peer.address} is overloaded: {error}"
                overloaded.append(error)
            finally:
                peer.in_flight -= 1
            self._num_retries += 1

    def _choose(self, key: bytes, lost: Mapping[str, str], overloaded: list[Overloaded]) -> PrefillPeer:
        usable = {
            peer.address: peer for peer in self._peers if peer.connection is not None and peer.address not in lost
        }
        if not usable:
            if overloaded:
                raise min(overloaded, key=lambda error: error.retry_after_s)
            raise self._unavailable(lost)
        return usable[ranked(key, {address: peer.in_flight for address, peer in usable.items()})[0]]

    async def _prefill_on(
        self, peer: PrefillPeer, request: GenerationRequest, token_ids: list[int], first_row: int
    ) -> AsyncGenerator[PrefillEvent]:
        connection = peer.connection
        assert connection is not None
        message = request_to_proto(request, token_ids, connection.session_id, self._format, first_row)
        receiver = PrefillReceiver(
            peer,
            connection,
            request,
            self._buffers,
            merge_size=self._merge_size,
            max_prompt_tokens=self._max_prompt_tokens,
            first_row=first_row,
        )
        call = prefill_method(connection.channel)(message, timeout=self._timeout_s, metadata=outgoing_metadata())
        try:
            # To the end, also of what is complete: a call that is cancelled takes its lease back.
            async for raw in call:
                event = receiver.take(parse_response(raw, prefill_pb2.PrefillResponse))
                if isinstance(event, RowsEvent):
                    self._on_hand_over(receiver.hand_over_s)
                    transport = connection.transport if isinstance(event.rows, LeasedRows) else "grpc"
                    self._received_nbytes[transport] += event.rows.num_tokens * self._format.row_nbytes
                if event is not None:
                    yield event
            if not receiver.complete:
                raise _WorkerLost("it ended the stream before the KV was here")
        except grpc.aio.AioRpcError as error:
            if receiver.complete:
                return
            named = error_from_rpc(error)
            if named is not None and not isinstance(named, EncoderUnavailable | PrefillUnavailable):
                raise named from error
            raise _WorkerLost(str(named or f"{error.code().name} {error.details()}")) from error
        except asyncio.CancelledError:
            if is_own_cancellation():
                raise
            if not receiver.complete:
                raise _WorkerLost("the connection was closed") from None
        finally:
            call.cancel()
            receiver.close()

    def _unavailable(self, lost: Mapping[str, str]) -> PrefillUnavailable:
        return PrefillUnavailable(f"no prefill worker is left: {self._reasons(lost)}; start one or give it time")


class _WorkerLost(Exception):
    """The prefill worker, or the way to it, is gone; the request is not at fault."""


def _routing_key(request: GenerationRequest, token_ids: list[int]) -> bytes:
    digest = hashlib.sha256(array("q", token_ids[:_NUM_ROUTED_TOKENS]).tobytes())
    for item in request.media[:1]:
        digest.update(item.content_key)
    return digest.digest()
