"""Rows on the receiving side: a view of the sender's pool under a lease, or a host buffer filled from chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vitrine_vlm.dtypes import ROW_DTYPES
from vitrine_vlm.embedding_transport.pools.pool import PoolMapping
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView
from vitrine_vlm.errors import InternalError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import ItemTimings, RowFormat

_MAX_KEPT_NBYTES = 512 * 1024 * 1024


def copy_rows(rows_TW: torch.Tensor, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
    """Copies rows from `first_row` on into the main and deepstack destinations; see EmbeddingRows.copy_to."""
    num_rows, hidden = main_TD.shape
    part_TW = rows_TW[first_row : first_row + num_rows]
    assert len(part_TW) == num_rows, f"rows {first_row}..{first_row + num_rows} of {len(rows_TW)}"
    if main_TD.is_cuda:
        from vitrine_vlm.embedding_transport.receiving.land_rows import (
            land_rows,  # needs Triton, which comes with torch's CUDA builds only
        )

        with torch.cuda.device(main_TD.device):
            # Rows on the host are copied to the GPU in one piece first.
            land_rows(part_TW.to(main_TD.device, non_blocking=True), main_TD, deepstack_NTD)
        return
    main_TD.copy_(part_TW[:, :hidden])
    if deepstack_NTD is not None:
        deepstack_NTD.copy_(part_TW[:, hidden:].unflatten(1, (len(deepstack_NTD), hidden)).transpose(0, 1))


@dataclass
class LeasedRows:
    """Rows in the sender's pool; `on_release` is called with the id of the lease."""

    num_tokens: int
    timings: ItemTimings
    mapping: PoolMapping
    lease: encoder_pb2.Lease
    rows_TW: torch.Tensor
    on_release: Callable[[int], None]
    _released: bool = False

    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        copy_rows(self.rows_TW, main_TD, deepstack_NTD, first_row)

    def queue_check(self) -> Callable[[], None]:
        return functools.partial(self._check, self.mapping.queue_header(self.lease.offset))

    def check(self) -> None:
        self._check(None)

    def _check(self, header: torch.Tensor | None) -> None:
        lease = self.lease
        self.mapping.check(lease.offset, lease.lease_id, lease.generation, lease.nbytes, header)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self.on_release(self.lease.lease_id)


class HostBufferPool:
    """Reuses host buffers: a new page costs more than the copy into it."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Returns a flat uint8 tensor of at least `nbytes` bytes; its contents are undefined."""
        fitting = [(buffer.nbytes, index) for index, buffer in enumerate(self._kept) if buffer.nbytes >= nbytes]
        if not fitting:
            # Powers of two, so that the next item of about this size fits.
            return torch.empty(1 << max(nbytes - 1, 1).bit_length(), dtype=torch.uint8)
        return self._kept.pop(min(fitting)[1])  # other threads only append to the list

    def release(self, buffer: torch.Tensor) -> None:
        if sum(kept.nbytes for kept in self._kept) + buffer.nbytes <= _MAX_KEPT_NBYTES:
            self._kept.append(buffer)


@dataclass
class HostRows:
    """Rows in a pooled host buffer."""

    num_tokens: int
    timings: ItemTimings
    rows_TW: torch.Tensor
    buffer: torch.Tensor | None
    on_release: Callable[[torch.Tensor], None]

    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        copy_rows(self.rows_TW, main_TD, deepstack_NTD, first_row)

    def queue_check(self) -> Callable[[], None]:
        return self.check

    def check(self) -> None:
        """Does nothing: the buffer belongs to this process."""

    def release(self) -> None:
        if self.buffer is not None:
            buffer, self.buffer = self.buffer, None
            self.on_release(buffer)


class ChunkAssembly:
    """Fills one item's host buffer from its chunks, which arrive in order and without gaps."""

    def __init__(self, num_tokens: int, row_format: RowFormat, pool: HostBufferPool) -> None:
        self.nbytes = num_tokens * row_format.row_nbytes
        self._shape = (num_tokens, row_format.row_width)
        self._dtype = ROW_DTYPES[row_format.dtype]
        self._pool = pool
        self._buffer: torch.Tensor | None = pool.allocate(self.nbytes)
        self._bytes = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        self._received_nbytes = 0

    @property
    def complete(self) -> bool:
        return self._received_nbytes == self.nbytes

    def add(self, chunk: ChunkView) -> None:
        """Copies a chunk into the buffer.

        Raises:
            InternalError: the chunk is out of order or past the end.
        """
        end = chunk.offset + chunk.data.nbytes
        if chunk.offset != self._received_nbytes or end > self.nbytes or not chunk.data.nbytes:
            raise InternalError(
                f"chunk [{chunk.offset}, {end}) after {self._received_nbytes} of {self.nbytes} bytes of item "
                f"{chunk.item_index}: the other side does not follow the protocol"
            )
        self._bytes[chunk.offset : end] = chunk.data
        self._received_nbytes = end

    def rows(self, timings: ItemTimings) -> HostRows:
        """Returns the complete rows; they own the buffer from now on."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None and self.complete
        rows_TW = buffer[: self.nbytes].view(self._dtype).view(self._shape)
        return HostRows(self._shape[0], timings, rows_TW, buffer, self._pool.release)

    def discard(self) -> None:
        """Releases the buffer, unless `rows` was called."""
        if self._buffer is not None:
            self._pool.release(self._buffer)
            self._buffer = None
