"""A tensor that the host writes and the device reads in every step."""

from __future__ import annotations

from typing import Any

import torch


class PinnedStagingBuffer:
    """Memory on the device at a fixed address, and pinned memory on the host; on the CPU they are the same.

    tensor: on the device. host: written by the host; the same tensor on the CPU.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._copied: torch.cuda.Event | None = None
        self.host = self.tensor
        if device.type == "cuda":
            self.host = torch.zeros(shape, dtype=dtype, pin_memory=True)
            self._copied = torch.cuda.Event()

    def wait(self) -> None:
        """Waits until the last copy has read the host's memory, so that it may be written."""
        if self._copied is not None:
            self._copied.synchronize()

    def writable(self) -> Any:
        """The host's memory as a NumPy array, after `wait`."""
        self.wait()
        return self.host.numpy()

    def copy_to_device(self, *parts: tuple[slice | int, ...]) -> None:
        """Copies these parts, which are contiguous, or everything, without waiting."""
        if self._copied is not None:
            for part in parts or ((),):
                self.tensor[part].copy_(self.host[part], non_blocking=True)
            self._copied.record()
