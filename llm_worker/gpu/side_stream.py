"""A second stream for what may run at the same time."""

from __future__ import annotations

import torch

from llm_worker.gpu.capture import Work


class SideStream:
    """Of a device; on a CPU one thing is done after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def both(self, aside: Work, meanwhile: Work) -> None:
        """Neither waits for the other; what comes next waits for both. Can be captured.

        Args:
            aside: uses no memory that `meanwhile` lets go of.
        """
        if self._stream is None:
            aside()
            meanwhile()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            aside()
        meanwhile()
        current.wait_stream(self._stream)
