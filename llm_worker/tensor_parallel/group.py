"""The ranks of a tensor parallel worker: one process a GPU, all on this host, over NCCL; over gloo without GPUs.

NCCL's collectives can be captured into CUDA graphs once they have run outside of one, as in every graph's warm-up.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# A collective takes longer only where another rank hangs; one that has ended is noticed at once.
_TIMEOUT = timedelta(minutes=2)
_NETWORK = {
    # Multicast over NVLink needs more of the host than containers usually have.
    "NCCL_NVLS_ENABLE": "0",
    # Over loopback only, so that no port can be reached from other hosts.
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}


class TorchGroup:
    """A `RankGroup` by torch.distributed, the default group of its process."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, rank: int, size: int, device: torch.device, store_file: Path) -> TorchGroup:
        """Waits for all ranks.

        Args:
            store_file: the file by which ranks find each other; a new name in a private folder.

        Raises:
            torch.distributed.DistError: not all ranks joined in time.
        """
        for name, value in _NETWORK.items():
            os.environ.setdefault(name, value)  # read by the libraries; variables that the user has set win
        is_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            init_method=f"file://{store_file}",
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
            device_id=device if is_gpu else None,  # so that it connects now, and not in the first step
        )
        return cls(rank, size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def gather_columns(self, x_TV: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x_TV) for _ in range(self.size)]
        dist.all_gather(parts, x_TV)
        return torch.cat(parts, dim=1)

    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrites every rank's `x`, which is contiguous, by that of rank 0."""
        dist.broadcast(x, 0)
