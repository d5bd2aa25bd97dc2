"""Turns the responses of one Encode call into events: layouts, leased rows, rows assembled from chunks."""

from __future__ import annotations

from embedding_transport.chunk_codec import ChunkView
from embedding_transport.encoder_peer import EncoderDescription, EncoderPeer
from embedding_transport.errors import InternalError, error_from_code
from embedding_transport.item_receiver import ItemReceiver
from embedding_transport.received_rows import HostBufferPool
from embedding_transport.row_peer import Connection
from embedding_transport.types import EncodeEvent, LayoutEvent, MediaItem, RowsEvent
from embedding_transport.wire import layout_from_proto
from protos.encoder.v1 import encoder_pb2


class EncodeReceiver:
    """Checks each response against the layout that came before; close it when the call is over."""

    def __init__(
        self,
        peer: EncoderPeer,
        connection: Connection[EncoderDescription],
        items: list[MediaItem],
        buffers: HostBufferPool,
    ) -> None:
        self._peer = peer
        self._connection = connection
        self._items = items
        self._buffers = buffers
        self._receivers: dict[int, ItemReceiver] = {}

    @property
    def num_missing(self) -> int:
        return len(self._items) - sum(receiver.done for receiver in self._receivers.values())

    def take(self, response: encoder_pb2.EncodeResponse | ChunkView) -> list[EncodeEvent]:
        if isinstance(response, ChunkView):
            return self._take_chunk(response)
        kind = response.WhichOneof("event")
        if kind == "layout":
            return [self._take_layout(response.layout)]
        if kind == "ready":
            return [self._take_ready(response.ready)]
        if kind == "failed":
            failed = response.failed
            raise error_from_code(failed.code, failed.message, failed.retry_after_s)
        raise InternalError(f"encoder {self._peer.address} sent an event of kind {kind!r}")

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()

    def _take_layout(self, message: encoder_pb2.Layout) -> LayoutEvent:
        index = message.item_index
        if index >= len(self._items) or index in self._receivers:
            raise InternalError(f"encoder {self._peer.address} sent a layout of item {index} unasked for")
        description = self._connection.description
        layout = layout_from_proto(message, self._items[index], description.merge_size)
        self._receivers[index] = ItemReceiver(
            self._peer, self._connection, layout.num_tokens, description.identity, self._buffers
        )
        return LayoutEvent(index, layout)

    def _take_ready(self, message: encoder_pb2.Ready) -> RowsEvent:
        return RowsEvent(message.item_index, self._receiver(message.item_index).take_ready(message))

    def _take_chunk(self, chunk: ChunkView) -> list[EncodeEvent]:
        rows = self._receiver(chunk.item_index).take_chunk(chunk)
        return [RowsEvent(chunk.item_index, rows)] if rows is not None else []

    def _receiver(self, index: int) -> ItemReceiver:
        receiver = self._receivers.get(index)
        if receiver is None or receiver.done:
            raise InternalError(f"encoder {self._peer.address} sent rows of item {index} that nobody waits for")
        return receiver
