"""The rows that have landed in one worker: copied into tensors of its own, from which steps of the model load them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.pools.pool import PoolMapping, PoolSource
from vitrine_vlm.embedding_transport.pools.pool_source import map_source
from vitrine_vlm.embedding_transport.pools.row_copies import on_copy_stream
from vitrine_vlm.errors import TransportUnavailable
from vitrine_vlm.vllm_connector.messages import Land, Map, Rows


class RowLanding:
    """Lands rows on the thread of the worker channel; steps load them on the thread of the model.

    Args:
        device: the worker's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: dict[int, PoolMapping] = {}
        self._landed: dict[int, torch.Tensor] = {}  # by delivery id; each operation on it is one of the interpreter's

    @property
    def num_landed(self) -> int:
        return len(self._landed)

    def map(self, command: Map) -> bytes:
        """Maps a pool and returns its nonce.

        Raises:
            TransportUnavailable: this worker cannot map it.
        """
        source: PoolSource = command.source
        mapping = map_source(source, self._device)
        nonce = mapping.read(command.probe_offset, command.probe_nbytes)
        self._pools[command.pool_id] = mapping
        return nonce

    def unmap(self, pool_id: int) -> None:
        self._pools.pop(pool_id, None)

    def land(self, command: Land) -> None:
        """Copies leased rows out of their pool, and returns once they are there. Does not wait for the model's work.

        Raises:
            TransportUnavailable: the pool is not mapped, or the rows do not lie in it.
            LeaseExpired: the encoder has released the rows.
        """
        rows, mapping = command.rows, self._pools.get(command.pool_id)
        if mapping is None:
            raise TransportUnavailable(f"pool {command.pool_id} is not mapped in this worker")
        shape, dtype = (rows.num_tokens, rows.row_width), DTYPES[rows.dtype]
        with on_copy_stream(self._device):
            own_TW = torch.empty(shape, dtype=dtype, device=self._device)
            own_TW.copy_(mapping.rows(command.offset, shape, dtype), non_blocking=True)
            header = mapping.queue_header(command.offset)
            self._synchronize()
        mapping.check(command.offset, command.lease_id, command.generation, rows.nbytes, header)
        self._landed[rows.delivery_id] = own_TW

    def land_bytes(self, rows: Rows, host_rows: torch.Tensor) -> None:
        """Copies rows that came as bytes to the device.

        Args:
            host_rows: flat uint8 on the host, of exactly the rows' bytes; belongs to this object from now on.
        """
        host_TW = host_rows.view(DTYPES[rows.dtype]).view(rows.num_tokens, rows.row_width)
        with on_copy_stream(self._device):
            own_TW = host_TW.to(self._device, non_blocking=True)
            self._synchronize()
        self._landed[rows.delivery_id] = own_TW

    def discard(self, delivery_ids: Iterable[int]) -> None:
        """Frees rows; ids of deliveries that are not here are ignored."""
        for delivery_id in delivery_ids:
            self._landed.pop(delivery_id, None)

    def load(self, delivery_ids: Mapping[str, int], encoder_cache: MutableMapping[str, torch.Tensor]) -> None:
        """Enters landed rows into the model's encoder cache; both share the memory.

        Args:
            delivery_ids: by the identifier in the cache.

        Raises:
            RuntimeError: rows have not landed; the scheduler never asks for such.
        """
        for identifier, delivery_id in delivery_ids.items():
            rows_TW = self._landed.get(delivery_id)
            if rows_TW is None:
                raise RuntimeError(f"the rows of {identifier} (delivery {delivery_id}) have not landed in this worker")
            if rows_TW.is_cuda:
                # Allocated on the copy stream: their memory may be used again only once the model's stream has read it.
                rows_TW.record_stream(torch.cuda.current_stream(rows_TW.device))
            encoder_cache[identifier] = rows_TW

    def close(self) -> None:
        self._landed.clear()
        self._pools.clear()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).record_event().synchronize()
