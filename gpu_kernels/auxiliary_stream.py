"""A second CUDA stream for work that may run beside the main one."""

from __future__ import annotations

import torch

from vitrine_vlm.gpu_kernels.graph_capture import Work


class AuxiliaryStream:
    """The auxiliary stream of a device; on a CPU one piece of work runs after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run_both(self, auxiliary: Work, main: Work) -> None:
        """Runs both pieces of work; later work on the current stream waits for both. This can be captured.

        Args:
            auxiliary: runs on the second stream, and uses no memory that `main` frees.
        """
        if self._stream is None:
            auxiliary()
            main()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            auxiliary()
        main()
        current.wait_stream(self._stream)
