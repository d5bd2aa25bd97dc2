"""The common part of all calls that return rows: rows of announced items, under a lease or in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from vitrine_vlm.dtypes import ROW_DTYPES
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection, RowPeer
from vitrine_vlm.embedding_transport.receiving.received_rows import ChunkAssembly, HostBufferPool, HostRows, LeasedRows
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView
from vitrine_vlm.embedding_transport.wire.messages import timings_from_proto
from vitrine_vlm.errors import InternalError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import RowFormat

# Far above any real item (the longest video of an 8B model has 400 MB): a false length must not exhaust the memory.
_MAX_ITEM_NBYTES = 4 * 1024**3

EventT = TypeVar("EventT")


class RowStream(ABC, Generic[EventT]):
    """Turns the responses of one call into events, and checks each response against the earlier ones.

    Args:
        row_format: the format of the received rows.
        max_nbytes: the most bytes of one item's rows.

    call_id: names the call in its request.
    """

    def __init__(
        self,
        peer: RowPeer[Any],
        connection: Connection[Any],
        row_format: RowFormat,
        buffers: HostBufferPool,
        max_nbytes: int = _MAX_ITEM_NBYTES,
    ) -> None:
        self.row_format = row_format
        self._sender = f"{peer.service} {peer.address}"
        self._peer = peer
        self._connection = connection
        self._buffers = buffers
        self._max_nbytes = max_nbytes
        self._announced: dict[int, _ItemRows] = {}
        self.call_id = peer.new_call_id()
        self._read_lease_ids: list[int] = []

    @property
    @abstractmethod
    def missing(self) -> str:
        """Describes what has not arrived yet; empty once everything has."""

    @abstractmethod
    def receive(self, raw: bytes) -> EventT | None:
        """Parses the next serialized response; returns the event that it completes, if any.

        Raises:
            InternalError, TransportUnavailable: the peer does not follow the protocol.
            VitrineError: the peer answers with this error.
        """

    def end(self) -> None:
        """Called at the end of a stream from which nothing is missing; raises an error that was put off until then."""

    def release_unread(self) -> None:
        """Releases the call's leases that were not read; called once it is cancelled or its deadline has passed."""
        if self._connection.mapping is not None:
            self._peer.release_unread(self._connection.session_id, self.call_id, self._read_lease_ids)

    def close(self) -> None:
        """Ends the stream and discards incomplete rows."""
        for item in self._announced.values():
            item.close()

    @property
    def _num_complete(self) -> int:
        """The number of items whose rows are complete."""
        return sum(item.complete for item in self._announced.values())

    def _announce(self, index: int, num_tokens: int) -> None:
        """Announces an item, whose rows may arrive from now on.

        Raises:
            InternalError: the item was announced before, or is too large.
        """
        nbytes = num_tokens * self.row_format.row_nbytes
        if index in self._announced or nbytes > self._max_nbytes:
            raise InternalError(
                f"{self._sender} announced {num_tokens} rows of {self.row_format.row_nbytes} bytes as item {index}: "
                f"an item may have at most {self._max_nbytes} bytes and is announced once"
            )
        self._announced[index] = _ItemRows(num_tokens, self.row_format, self._buffers)

    def _receive_rows(self, message: encoder_pb2.Ready | ChunkView) -> LeasedRows | HostRows | None:
        """Returns an item's rows if this message completes them.

        Raises:
            InternalError: the rows are not missing, have another size, or lie in a pool that was not negotiated.
            TransportUnavailable: the lease does not lie in the pool.
        """
        index = message.item_index
        item = self._announced.get(index)
        if item is None or item.complete:
            raise InternalError(f"{self._sender} sent rows of item {index}, which is not announced or already complete")
        return item.add_chunk(message) if isinstance(message, ChunkView) else self._leased(item, message)

    def _leased(self, item: _ItemRows, message: encoder_pb2.Ready) -> LeasedRows:
        start = time.perf_counter()
        peer, connection, lease = self._peer, self._connection, message.lease
        shape = (item.num_tokens, self.row_format.row_width)
        if connection.mapping is None or lease.nbytes != item.num_tokens * self.row_format.row_nbytes:
            raise InternalError(
                f"{self._sender} leased {lease.nbytes} bytes for {shape[0]} rows of {self.row_format.row_nbytes} bytes "
                f"over {connection.transport}"
            )
        rows_TW = connection.mapping.rows(lease.offset, shape, ROW_DTYPES[self.row_format.dtype])
        item.complete = True
        timings = timings_from_proto(message.timings, (time.perf_counter() - start) * 1000)
        release = lambda lease_id: peer.release(connection.session_id, lease_id)  # noqa: E731
        peer.num_leases += 1
        self._read_lease_ids.append(lease.lease_id)
        return LeasedRows(item.num_tokens, timings, connection.mapping, lease, rows_TW, release)


class _ItemRows:
    """One announced item. `complete`: its rows have been returned to the caller."""

    def __init__(self, num_tokens: int, row_format: RowFormat, buffers: HostBufferPool) -> None:
        self.num_tokens = num_tokens
        self.complete = False
        self._format = row_format
        self._buffers = buffers
        self._assembly: ChunkAssembly | None = None
        self._first_chunk_at = 0.0

    def add_chunk(self, chunk: ChunkView) -> HostRows | None:
        """Returns the rows if this was the last chunk."""
        if self._assembly is None:
            self._assembly = ChunkAssembly(self.num_tokens, self._format, self._buffers)
            self._first_chunk_at = time.perf_counter()
        self._assembly.add(chunk)
        if not self._assembly.complete:
            return None
        self.complete = True
        ship_ms = (time.perf_counter() - self._first_chunk_at) * 1000
        return self._assembly.rows(timings_from_proto(chunk.timings or encoder_pb2.ItemTimings(), ship_ms))

    def close(self) -> None:
        if self._assembly is not None:
            self._assembly.discard()
