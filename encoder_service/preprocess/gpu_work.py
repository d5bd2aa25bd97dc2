"""Preprocessing on a GPU: each thread has a stream of its own, so that none waits for the tower or another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrine_vlm.encoder_service.preprocess.patchify import interpolate
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings


class GpuWork:
    """The streams and constants of preprocessing on one device; on the CPU it does nothing.

    dtype: of patches of images, and of those that a caller has cut: on a GPU the tower's, on the CPU float32.
    """

    def __init__(self, device: torch.device, settings: ProcessorSettings, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype if device.type == "cuda" else torch.float32
        self._settings = settings
        self._of_thread = threading.local()
        if device.type == "cuda":
            self._mean, self._std = (
                torch.tensor(values, device=device) * 255.0 for values in (settings.image_mean, settings.image_std)
            )

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Launches inside go to the thread's stream, and are complete at the end of the context."""
        if self.device.type == "cpu":
            yield
            return
        if not hasattr(self._of_thread, "stream"):
            # High priority: a whole batch will wait for these small kernels, which run beside the tower's large ones.
            self._of_thread.stream = torch.cuda.Stream(self.device, priority=-1)
        with torch.cuda.stream(self._of_thread.stream):
            yield
        self._of_thread.stream.synchronize()

    def image_patches(self, pixels_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Resizes, rounds, normalizes and cuts an image on the GPU, in two launches; see `patchify` for the order.

        Args:
            pixels_CHW: uint8, on the GPU.

        Returns:
            [P, D]. Pixels differ from the CPU's by one grey level: weights are not rounded here.
        """
        from vitrine_vlm.encoder_service.gpu.kernels import (
            image_patches,  # needs Triton, which comes with torch's CUDA builds only
        )

        if pixels_CHW.shape[-2:] != (height, width):
            pixels_CHW = interpolate(pixels_CHW.float(), height, width)
        settings = self._settings
        return image_patches(
            pixels_CHW,
            self._mean,
            self._std,
            settings.patch_size,
            settings.merge_size,
            settings.temporal_patch_size,
            self.dtype,
        )
