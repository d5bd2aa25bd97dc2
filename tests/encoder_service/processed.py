"""Patches as transformers' own processors cut them, as a caller would send them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor
from transformers.video_utils import read_video_pyav

from tests.encoder_service.preprocess.reference import image_processor, video_processor
from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.model_loading.checkpoint import Checkpoint
from vitrine_vlm.types import MediaItem, MediaKind, Patches

PIXELS = {"do_rescale": False, "do_normalize": False}


def patches_of(folder: Path, item: MediaItem, dtype: str, times: tuple[float, ...] = ()) -> Patches:
    """The patches of an item with `data`: pixels for uint8, else normalized.

    Args:
        folder: the checkpoint's.
        times: of the temporal patches of a video.
    """
    options = PIXELS if dtype == "uint8" else {}
    cut = _image(folder, item, options) if item.kind == "image" else _video(folder, item, options)
    patches_PD, grid_thw = cut
    patches_PD = patches_PD if dtype == "uint8" else patches_PD.to(DTYPES[dtype])
    assert patches_PD.dtype == (torch.uint8 if dtype == "uint8" else DTYPES[dtype])
    return given(item.kind, patches_PD, grid_thw, dtype != "uint8", times)


def given(
    kind: MediaKind,
    patches_PD: torch.Tensor,
    grid_thw: tuple[int, int, int],
    normalized: bool,
    times: tuple[float, ...] = (),
) -> Patches:
    """These patches as bytes; a video without times has half a second between its temporal patches."""
    data = patches_PD.contiguous().view(torch.uint8).numpy().tobytes()
    interval_s = 0.5 if kind == "video" and not times else 0.0
    dtype = str(patches_PD.dtype).removeprefix("torch.")
    return Patches(data, dtype, normalized, grid_thw, times, interval_s)


def _image(folder: Path, item: MediaItem, options: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, int, int]]:
    config = Checkpoint(folder, "", "").json("preprocessor_config.json")
    image = Image.open(io.BytesIO(item.data or b""))
    processed = image_processor(config)(images=[image], return_tensors="pt", **options)
    t, h, w = processed["image_grid_thw"][0].tolist()
    return processed["pixel_values"], (t, h, w)


def _video(folder: Path, item: MediaItem, options: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, int, int]]:
    checkpoint = Checkpoint(folder, "", "")
    config = checkpoint.json("video_preprocessor_config.json") or checkpoint.json("preprocessor_config.json")
    model_type = checkpoint.config["model_type"]
    sizes = Qwen3OmniMoeProcessor.videos_kwargs if model_type == "qwen3_omni_moe" else {}
    frames, metadata = read_video_pyav(
        io.BytesIO(item.data or b""), lambda metadata, **_: np.arange(metadata.total_num_frames)
    )
    processed = video_processor(model_type, config)(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()],
        video_metadata=[metadata],
        do_sample_frames=True,
        fps=2,
        return_tensors="pt",
        **sizes,
        **options,
    )
    t, h, w = processed["video_grid_thw"][0].tolist()
    return processed["pixel_values_videos"], (t, h, w)
