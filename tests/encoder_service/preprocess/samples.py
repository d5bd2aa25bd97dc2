"""Images, videos and settings that the tests make for themselves."""

from __future__ import annotations

import io
import json
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from vitrine_vlm.encoder_service.families import processor_settings
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.model_loading.checkpoint import Checkpoint

# The processor files of released checkpoints.
QWEN3_IMAGE: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN3_VIDEO: dict[str, Any] = QWEN3_IMAGE | {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
QWEN25_IMAGE: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# One file for images, sounds and videos; what is of the sounds is left out here.
OMNI_IMAGE: dict[str, Any] = QWEN3_IMAGE | {"size": None, "min_pixels": 3136, "max_pixels": 12845056}
# What Qwen3OmniMoeProcessor hands to its video processor in every call.
OMNI_VIDEO: dict[str, Any] = QWEN3_IMAGE | {"size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}}
IMAGE_CONFIGS = {"qwen3_vl": QWEN3_IMAGE, "qwen2_5_vl": QWEN25_IMAGE, "qwen3_omni_moe": OMNI_IMAGE}
VIDEO_CONFIGS = {"qwen3_vl": QWEN3_VIDEO, "qwen2_5_vl": QWEN25_IMAGE, "qwen3_omni_moe": OMNI_VIDEO}


def settings(
    folder: Path, model_type: str, image: dict[str, Any], video: dict[str, Any] | None = None
) -> ProcessorSettings:
    """Settings read from a checkpoint folder that holds only the processor's files."""
    write_checkpoint(folder, model_type, image, video)
    return processor_settings(Checkpoint(folder, "model", "revision"))


def write_checkpoint(folder: Path, model_type: str, image: dict[str, Any], video: dict[str, Any] | None) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    if video is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB, 8 bits: broad shapes, edges and grain, as in a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(5, 40) + y / rng.uniform(5, 40) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 128 + 70 * np.stack(waves, axis=-1) + rng.normal(0, 6, (height, width, 3))
    pixels[(x // 24 + y // 24) % 5 == 0] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png_rgb16(pixels_HWC: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    height, width, _ = pixels_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def video(
    num_frames: int,
    width: int = 64,
    height: int = 48,
    fps: Fraction | int = 10,
    container: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
) -> bytes:
    """A clip in which every frame differs from the others."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        background = np.asarray(photo(width, height))
        for index in range(num_frames):
            pixels = np.roll(background, 3 * index, axis=1)
            pixels[: height // 4, : width // 4] = (37 * index) % 256
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()
