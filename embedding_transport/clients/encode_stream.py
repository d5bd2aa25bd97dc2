"""The responses of one Encode call, checked against what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderDescription, EncoderPeer
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection
from vitrine_vlm.embedding_transport.receiving.received_rows import HostBufferPool
from vitrine_vlm.embedding_transport.receiving.row_stream import RowStream
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView, parse_response
from vitrine_vlm.embedding_transport.wire.messages import layout_from_proto
from vitrine_vlm.errors import InternalError, VitrineError, error_from_code
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import EncodeEvent, Layout, LayoutEvent, MediaItem, RowsEvent, Ticket

_TICKET_NBYTES = 16


class ItemMoved(Exception):
    """The items of a call that have no rows yet are taken to another encoder."""


class EncodeStream(RowStream[EncodeEvent]):
    """The responses of one Encode call.

    Args:
        items: those of the call, in its order, by their index in the request.
        layout_only: whether layouts alone were asked for; each then has a ticket, unless its item has one.
        leaves: called with layouts for as long as the call can be cancelled without the loss of what it has brought;
            whether it is.
    """

    def __init__(
        self,
        peer: EncoderPeer,
        connection: Connection[EncoderDescription],
        items: Mapping[int, MediaItem],
        buffers: HostBufferPool,
        *,
        layout_only: bool,
        leaves: Callable[[Layout], bool],
    ) -> None:
        super().__init__(peer, connection, connection.description.identity, buffers)
        self._description = connection.description
        self._items = list(items.items())
        self._layout_only = layout_only
        self._leaves = leaves
        self._failures: list[VitrineError] = []

    @property
    def missing(self) -> str:
        num_done = len(self._announced) + len(self._failures) if self._layout_only else self._num_complete
        num_missing = len(self._items) - num_done
        return f"{num_missing} items" if num_missing else ""

    @property
    def _has_brought(self) -> bool:
        """Whether there are leases or tickets of this call, which end if it is cancelled."""
        return bool(self._announced if self._layout_only else self._num_complete)

    def receive(self, raw: bytes) -> EncodeEvent | None:
        response = parse_response(raw, encoder_pb2.EncodeResponse)
        if isinstance(response, ChunkView):
            return self._rows(response)
        kind = response.WhichOneof("event")
        if kind == "layout":
            return self._layout(response.layout)
        if kind == "ready":
            return self._rows(response.ready)
        if kind == "failed":
            failed = response.failed
            error = error_from_code(failed.code, failed.message, failed.retry_after_s)
            if not self._layout_only:
                raise error
            self._failures.append(error)
            return None
        raise InternalError(f"{self._sender} sent an event of kind {kind!r}")

    def end(self) -> None:
        """Raises the first failure of layouts: a call that ends earlier would lose tickets that are on their way."""
        if self._failures:
            raise self._failures[0]

    def release_unread(self) -> None:
        if not self._layout_only:  # layouts come with tickets, which belong to no call
            super().release_unread()

    def _layout(self, message: encoder_pb2.Layout) -> LayoutEvent:
        if message.item_index >= len(self._items):
            raise InternalError(f"{self._sender} sent a layout of item {message.item_index} of {len(self._items)}")
        index, item = self._items[message.item_index]
        layout = layout_from_proto(message, item, self._description.merge_size)
        if self._layout_only and item.ticket is None:
            if len(message.ticket) != _TICKET_NBYTES:
                raise InternalError(f"{self._sender} sent a ticket of {len(message.ticket)} bytes for item {index}")
            layout = replace(layout, ticket=Ticket(self._description.instance_id, message.ticket))
        if not self._has_brought and self._leaves(layout):
            raise ItemMoved
        self._announce(message.item_index, layout.num_tokens)
        return LayoutEvent(index, layout)

    def _rows(self, message: encoder_pb2.Ready | ChunkView) -> RowsEvent | None:
        if self._layout_only:
            raise InternalError(f"{self._sender} sent rows where layouts alone were asked for")
        rows = self._receive_rows(message)
        if rows is None:
            return None
        index, _ = self._items[message.item_index]
        return RowsEvent(index, rows)
