"""How a client maps the pools that services offer: in its own process, or by others that land the rows for it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcMapping
from vitrine_vlm.embedding_transport.pools.pool import PoolMapping
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmMapping
from vitrine_vlm.errors import TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2


class PoolMapper(Protocol):
    """Maps offered pools."""

    def map(self, offer: encoder_pb2.Offer) -> PoolMapping:
        """Maps the offered pool, such that its nonce can be read. Blocks; called in a thread of its own.

        Raises:
            TransportUnavailable: the pool cannot be mapped; CUDA may raise other types.
        """
        ...


class LocalMapper:
    """Maps pools in this process.

    Args:
        shm_folder: the shared-memory folder, the same as the service's.
        gpu: the GPU on which rows are landed, if any.
    """

    def __init__(self, shm_folder: Path, gpu: torch.device | None) -> None:
        self._shm_folder, self._gpu = shm_folder, gpu

    def map(self, offer: encoder_pb2.Offer) -> PoolMapping:
        if offer.WhichOneof("pool") == "shm":
            return ShmMapping(self._shm_folder, offer.shm.name, offer.shm.nbytes)
        if self._gpu is None:
            raise TransportUnavailable("the rows lie in GPU memory, and this process has no GPU to land them on")
        pool = offer.cuda_ipc
        return CudaIpcMapping(pool.handle, pool.nbytes, pool.gpu_uuid, self._gpu)
