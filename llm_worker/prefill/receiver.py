"""Turns the responses of one Prefill call into events: layouts, the first token, the prompt's KV."""

from __future__ import annotations

import time

from embedding_transport.chunk_codec import ChunkView
from embedding_transport.errors import InternalError, PromptTooLong
from embedding_transport.item_receiver import ItemReceiver
from embedding_transport.received_rows import HostBufferPool
from embedding_transport.row_peer import Connection
from embedding_transport.types import LayoutEvent, RowsEvent
from embedding_transport.wire import layout_from_proto
from llm_worker.frontend.events import GenerationRequest
from llm_worker.prefill.kv_format import KvFormat
from llm_worker.prefill.peer import PrefillPeer
from llm_worker.prefill.wire import Prefilled, prefilled_from_proto
from protos.encoder.v1 import encoder_pb2
from protos.prefill.v1 import prefill_pb2

PrefillEvent = LayoutEvent | Prefilled | RowsEvent


class PrefillReceiver:
    """Checks each response against what came before; close it when the call is over.

    complete: nothing more is needed; hand_over_s: from the first token to the KV being readable here, seconds.

    Args:
        merge_size: patches merged into one token along each side.
        max_prompt_tokens: the longest prompt whose KV is taken in.
        first_row: of the KV that was asked for.
    """

    def __init__(
        self,
        peer: PrefillPeer,
        connection: Connection[KvFormat],
        request: GenerationRequest,
        buffers: HostBufferPool,
        *,
        merge_size: int,
        max_prompt_tokens: int,
        first_row: int,
    ) -> None:
        self.complete = False
        self.hand_over_s = 0.0
        self._peer = peer
        self._connection = connection
        self._request = request
        self._buffers = buffers
        self._merge_size = merge_size
        self._max_prompt_tokens = max_prompt_tokens
        self._first_row = first_row
        self._kv: ItemReceiver | None = None
        self._prefilled_at = 0.0

    def take(self, response: prefill_pb2.PrefillResponse | ChunkView) -> PrefillEvent | None:
        """
        Raises:
            InternalError, TransportUnavailable: the prefill worker does not follow the protocol.
            PromptTooLong: a media item alone is longer than any prompt.
        """
        if isinstance(response, ChunkView):
            return self._take_rows(response)
        kind = response.WhichOneof("event")
        if kind == "layout":
            return self._take_layout(response.layout)
        if kind == "prefilled":
            return self._take_prefilled(response.prefilled)
        if kind == "ready":
            return self._take_rows(response.ready)
        raise InternalError(f"prefill worker {self._peer.address} sent an event of kind {kind!r}")

    def close(self) -> None:
        if self._kv is not None:
            self._kv.close()

    def _take_layout(self, message: encoder_pb2.Layout) -> LayoutEvent:
        index = message.item_index
        if index >= len(self._request.media):
            raise InternalError(f"prefill worker {self._peer.address} sent a layout of item {index} unasked for")
        if message.num_tokens > self._max_prompt_tokens:
            raise PromptTooLong(
                f"media item {index} has {message.num_tokens} tokens, prompt and answer at most "
                f"{self._max_prompt_tokens}: send a smaller one or raise --max-model-len"
            )
        return LayoutEvent(index, layout_from_proto(message, self._request.media[index], self._merge_size))

    def _take_prefilled(self, message: prefill_pb2.Prefilled) -> Prefilled:
        num_tokens, kv_format = message.num_prompt_tokens, self._connection.description
        if self._kv is not None or not self._first_row < num_tokens <= self._max_prompt_tokens:
            raise InternalError(
                f"prefill worker {self._peer.address} computed a prompt of {num_tokens} tokens: at most "
                f"{self._max_prompt_tokens} are taken in, once, and there are {self._first_row} of it here"
            )
        max_nbytes = self._max_prompt_tokens * kv_format.row_nbytes
        num_rows = num_tokens - self._first_row
        self._kv = ItemReceiver(self._peer, self._connection, num_rows, kv_format, self._buffers, max_nbytes)
        self._prefilled_at = time.perf_counter()
        self.complete = self._request.sampling.is_last(message.token_id)
        return prefilled_from_proto(message)

    def _take_rows(self, message: encoder_pb2.Ready | ChunkView) -> RowsEvent | None:
        if self._kv is None:
            raise InternalError(f"prefill worker {self._peer.address} sent KV before the first token")
        rows = self._kv.take_chunk(message) if isinstance(message, ChunkView) else self._kv.take_ready(message)
        if rows is None:
            return None
        self.complete = True
        self.hand_over_s = time.perf_counter() - self._prefilled_at
        return RowsEvent(0, rows)
