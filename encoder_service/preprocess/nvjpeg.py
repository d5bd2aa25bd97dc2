"""Decodes JPEGs on the GPU by torchvision, where it is installed with CUDA."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

_log = logging.getLogger(__name__)


@functools.cache
def has_nvjpeg() -> bool:
    """Whether torchvision can decode on the GPU here; the reason it cannot is logged once."""
    try:
        from torchvision.io import decode_jpeg, encode_jpeg

        grey = torch.full((3, 16, 16), 128, dtype=torch.uint8)
        decode_jpeg(encode_jpeg(grey), device="cuda")
    except (ImportError, RuntimeError) as error:
        _log.info("no JPEG decoding on the GPU, Pillow decodes: %s", error)
        return False
    return True


def decode(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    """The pixels of each file, [3, height, width], uint8, on the GPU, not turned upright.

    Raises:
        RuntimeError: nvJPEG cannot decode one of the files.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    # The copies are there because torch needs writable memory.
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    pixels: list[torch.Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return pixels
