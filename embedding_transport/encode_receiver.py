"""Turns the responses of one Encode call into events: layouts, leased rows, rows assembled from chunks."""

from __future__ import annotations

import time

from embedding_transport.chunk_codec import ChunkView
from embedding_transport.encoder_peer import Connection, EncoderPeer
from embedding_transport.errors import InternalError, error_from_code
from embedding_transport.received_rows import ChunkAssembly, HostBufferPool, LeasedRows
from embedding_transport.types import DTYPES, EncodeEvent, Layout, LayoutEvent, MediaItem, RowsEvent
from embedding_transport.wire import layout_from_proto, timings_from_proto
from protos.encoder.v1 import encoder_pb2


class EncodeReceiver:
    """Checks each response against the layout that came before; close it when the call is over."""

    def __init__(
        self, peer: EncoderPeer, connection: Connection, items: list[MediaItem], buffers: HostBufferPool
    ) -> None:
        self._peer = peer
        self._connection = connection
        self._items = items
        self._buffers = buffers
        self._layouts: dict[int, Layout] = {}
        self._assemblies: dict[int, ChunkAssembly] = {}
        self._first_chunk_at: dict[int, float] = {}
        self._done: set[int] = set()

    @property
    def num_missing(self) -> int:
        return len(self._items) - len(self._done)

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
        for assembly in self._assemblies.values():
            assembly.drop()

    def _take_layout(self, message: encoder_pb2.Layout) -> LayoutEvent:
        index = message.item_index
        if index >= len(self._items) or index in self._layouts:
            raise InternalError(f"encoder {self._peer.address} sent a layout of item {index} unasked for")
        merge_size = self._connection.description.processor.merge_size
        self._layouts[index] = layout_from_proto(message, self._items[index], merge_size)
        return LayoutEvent(index, self._layouts[index])

    def _take_ready(self, message: encoder_pb2.Ready) -> RowsEvent:
        start = time.perf_counter()
        layout = self._expected_layout(message.item_index)
        lease, connection = message.lease, self._connection
        shape = (layout.num_tokens, connection.identity.row_width)
        if connection.mapping is None or lease.nbytes != layout.num_tokens * connection.identity.row_nbytes:
            raise InternalError(
                f"encoder {self._peer.address} leased {lease.nbytes} bytes for {shape[0]} rows of "
                f"{connection.identity.row_nbytes} bytes over {connection.transport}"
            )
        rows_TW = connection.mapping.rows(lease.offset, shape, DTYPES[connection.identity.dtype])
        self._done.add(message.item_index)
        timings = timings_from_proto(message.timings, (time.perf_counter() - start) * 1000)
        release = lambda lease_id: self._peer.release(connection.session_id, lease_id)  # noqa: E731
        self._peer.num_held += 1
        rows = LeasedRows(layout.num_tokens, timings, connection.mapping, lease, rows_TW, release)
        return RowsEvent(message.item_index, rows)

    def _take_chunk(self, chunk: ChunkView) -> list[EncodeEvent]:
        index = chunk.item_index
        layout = self._expected_layout(index)
        if index not in self._assemblies:
            self._assemblies[index] = ChunkAssembly(layout, self._connection.identity, self._buffers)
            self._first_chunk_at[index] = time.perf_counter()
        assembly = self._assemblies[index]
        assembly.add(chunk)
        if not assembly.complete:
            return []
        self._done.add(index)
        ship_ms = (time.perf_counter() - self._first_chunk_at[index]) * 1000
        timings = timings_from_proto(chunk.timings or encoder_pb2.ItemTimings(), ship_ms)
        return [RowsEvent(index, assembly.rows(timings))]

    def _expected_layout(self, index: int) -> Layout:
        if index not in self._layouts or index in self._done:
            raise InternalError(f"encoder {self._peer.address} sent rows of item {index} that nobody waits for")
        return self._layouts[index]
