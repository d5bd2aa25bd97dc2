"""Maps a pool that another process of this host has mapped already."""

from __future__ import annotations

from pathlib import Path

import torch

from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcMapping
from vitrine_vlm.embedding_transport.pools.pool import PoolMapping, PoolSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmMapping


def map_source(source: PoolSource, device: torch.device) -> PoolMapping:
    """Maps the pool that `source` describes.

    Args:
        source: the result of `PoolMapping.source`.
        device: the device on which the rows are landed.

    Raises:
        TransportUnavailable: this process cannot map it.
    """
    nbytes = int(source["nbytes"])
    if "handle" in source:
        return CudaIpcMapping(bytes.fromhex(str(source["handle"])), nbytes, str(source["uuid"]), device)
    return ShmMapping(Path(str(source["folder"])), str(source["name"]), nbytes)
