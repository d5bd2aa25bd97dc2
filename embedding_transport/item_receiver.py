"""Takes in the rows of one item, whose size is known: under a lease, or chunk by chunk."""

from __future__ import annotations

import time
from typing import Any

from embedding_transport.chunk_codec import ChunkView
from embedding_transport.errors import InternalError
from embedding_transport.received_rows import ChunkAssembly, HostBufferPool, HostRows, LeasedRows
from embedding_transport.row_peer import Connection, RowPeer
from embedding_transport.types import DTYPES, RowFormat
from embedding_transport.wire import timings_from_proto
from protos.encoder.v1 import encoder_pb2

# Far above any real item (the longest video of an 8B model is 400 MB): a length that is a lie must not take all memory.
_MAX_ITEM_NBYTES = 4 * 1024**3


class ItemReceiver:
    """Checks what comes against the size; close it when the call is over.

    done: its rows have been handed out.

    Raises:
        InternalError: more rows than any item has.
    """

    def __init__(
        self,
        peer: RowPeer[Any],
        connection: Connection[Any],
        num_tokens: int,
        row_format: RowFormat,
        buffers: HostBufferPool,
        max_nbytes: int = _MAX_ITEM_NBYTES,
    ) -> None:
        if num_tokens * row_format.row_nbytes > max_nbytes:
            raise InternalError(
                f"{peer.service} {peer.address} announced {num_tokens} rows of {row_format.row_nbytes} bytes: at most "
                f"{max_nbytes} bytes are taken in for one item"
            )
        self.done = False
        self._peer = peer
        self._connection = connection
        self._num_tokens = num_tokens
        self._format = row_format
        self._buffers = buffers
        self._assembly: ChunkAssembly | None = None
        self._first_chunk_at = 0.0

    def take_ready(self, message: encoder_pb2.Ready) -> LeasedRows:
        """
        Raises:
            InternalError: the lease is of another size, or of a pool that was not offered.
            TransportUnavailable: it does not lie in the pool.
        """
        start = time.perf_counter()
        self._check_wanted()
        lease, connection = message.lease, self._connection
        shape = (self._num_tokens, self._format.row_width)
        if connection.mapping is None or lease.nbytes != self._num_tokens * self._format.row_nbytes:
            raise InternalError(
                f"{self._peer.service} {self._peer.address} leased {lease.nbytes} bytes for {shape[0]} rows of "
                f"{self._format.row_nbytes} bytes over {connection.transport}"
            )
        rows_TW = connection.mapping.rows(lease.offset, shape, DTYPES[self._format.dtype])
        self.done = True
        timings = timings_from_proto(message.timings, (time.perf_counter() - start) * 1000)
        release = lambda lease_id: self._peer.release(connection.session_id, lease_id)  # noqa: E731
        self._peer.num_held += 1
        return LeasedRows(self._num_tokens, timings, connection.mapping, lease, rows_TW, release)

    def take_chunk(self, chunk: ChunkView) -> HostRows | None:
        """The rows, once this was the last chunk.

        Raises:
            InternalError: a chunk out of order or past the end.
        """
        self._check_wanted()
        if self._assembly is None:
            self._assembly = ChunkAssembly(self._num_tokens, self._format, self._buffers)
            self._first_chunk_at = time.perf_counter()
        self._assembly.add(chunk)
        if not self._assembly.complete:
            return None
        self.done = True
        ship_ms = (time.perf_counter() - self._first_chunk_at) * 1000
        return self._assembly.rows(timings_from_proto(chunk.timings or encoder_pb2.ItemTimings(), ship_ms))

    def close(self) -> None:
        if self._assembly is not None:
            self._assembly.drop()

    def _check_wanted(self) -> None:
        if self.done:
            raise InternalError(f"{self._peer.service} {self._peer.address} sent rows twice")
