"""Turns the responses of one Prefill call into events: layouts, the first token, the prompt's KV."""

from __future__ import annotations

from vitrine_vlm.embedding_transport.fleet.row_peer import Connection
from vitrine_vlm.embedding_transport.receiving.received_rows import HostBufferPool
from vitrine_vlm.embedding_transport.receiving.row_stream import RowStream
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView, parse_response
from vitrine_vlm.embedding_transport.wire.messages import layout_from_proto
from vitrine_vlm.errors import InternalError, PromptTooLong
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.prefill.peer import PrefillPeer
from vitrine_vlm.llm_worker.prefill.wire import Prefilled, prefilled_from_proto
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2
from vitrine_vlm.types import LayoutEvent, RowsEvent

PrefillEvent = LayoutEvent | Prefilled | RowsEvent

# The only rows of a call: their item_index.
_KV = 0


class PrefillStream(RowStream[PrefillEvent]):
    """The responses of one Prefill call.

    Args:
        merge_size: patches merged into one token along each side.
        max_prompt_tokens: the longest prompt whose KV is accepted.
        first_row: the first KV row that was requested.
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
        kv_format = connection.description
        super().__init__(peer, connection, kv_format, buffers, max_prompt_tokens * kv_format.row_nbytes)
        self._request = request
        self._merge_size = merge_size
        self._max_prompt_tokens = max_prompt_tokens
        self._first_row = first_row
        self._ends_here = False

    @property
    def missing(self) -> str:
        return "" if self._ends_here or self._num_complete else "KV"

    def receive(self, raw: bytes) -> PrefillEvent | None:
        """
        Raises:
            PromptTooLong: a media item alone is longer than any prompt.
        """
        response = parse_response(raw, prefill_pb2.PrefillResponse)
        if isinstance(response, ChunkView):
            return self._kv(response)
        kind = response.WhichOneof("event")
        if kind == "layout":
            return self._layout(response.layout)
        if kind == "prefilled":
            return self._prefilled(response.prefilled)
        if kind == "ready":
            return self._kv(response.ready)
        raise InternalError(f"{self._sender} sent an event of kind {kind!r}")

    def _layout(self, message: encoder_pb2.Layout) -> LayoutEvent:
        index = message.item_index
        if index >= len(self._request.media):
            raise InternalError(f"{self._sender} sent a layout of item {index}, which was not requested")
        if message.num_tokens > self._max_prompt_tokens:
            raise PromptTooLong(
                f"media item {index} has {message.num_tokens} tokens, prompt and answer may have "
                f"{self._max_prompt_tokens}: send a smaller one or raise --max-model-len"
            )
        return LayoutEvent(index, layout_from_proto(message, self._request.media[index], self._merge_size))

    def _prefilled(self, message: prefill_pb2.Prefilled) -> Prefilled:
        num_tokens = message.num_prompt_tokens
        if not self._first_row < num_tokens <= self._max_prompt_tokens:
            raise InternalError(
                f"{self._sender} computed a prompt of {num_tokens} tokens: {self._max_prompt_tokens} are accepted "
                f"at most, and KV from row {self._first_row} on was requested"
            )
        self._announce(_KV, num_tokens - self._first_row)
        self._ends_here = self._request.sampling.is_last(message.token_id)
        return prefilled_from_proto(message)

    def _kv(self, message: encoder_pb2.Ready | ChunkView) -> RowsEvent | None:
        rows = self._receive_rows(message)
        return RowsEvent(_KV, rows) if rows is not None else None
