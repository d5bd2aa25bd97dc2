"""The ranks of a tensor parallel worker: one process a GPU, all on this host, over NCCL; over gloo without GPUs.

NCCL's sums can be captured into CUDA graphs once they ran outside of one, as every graph's warm-up has them do.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# A collective that takes longer means that another rank hangs: one that died is noticed at once.
_TIMEOUT = timedelta(minutes=2)
_NETWORK = {
    # Multicast over NVLink asks for more of the host than containers usually have.
    "NCCL_NVLS_ENABLE": "0",
    # Ranks find each other over loopback: nothing listens where others could reach it.
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
            store_file: where they find each other; a new name in a folder of our own.

        Raises:
            torch.distributed.DistError: not all of them came in time.
        """
        for name, value in _NETWORK.items():
            os.environ.setdefault(name, value)  # read by the libraries; what the user has set counts
        is_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            init_method=f"file://{store_file}",
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
            device_id=device if is_gpu else None,  # connects now, and not within the first step
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
