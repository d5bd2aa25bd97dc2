"""Class attributes of transformers 5.23's image and video processors, shared by several families.

Source: `models/qwen2_vl/image_processing_qwen2_vl.py` and `video_processing_qwen2_vl.py`,
`models/qwen3_vl/video_processing_qwen3_vl.py`; times of frames: `models/qwen3_vl/processing_qwen3_vl.py`.
"""

from __future__ import annotations

from typing import Any

from vitrine_vlm.encoder_service.preprocess.settings import ProcessorDefaults

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

QWEN2_VL_IMAGE: dict[str, Any] = {  # Qwen2VLImageProcessor
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
QWEN2_VL_VIDEO: dict[str, Any] = {  # Qwen2VLVideoProcessor
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "patch_size": 14,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    # The class has no rate and does not sample: every frame would be encoded. Qwen's utilities sample 2 a second.
    "fps": 2,
    "do_sample_frames": True,
}
QWEN3_VL_VIDEO: dict[str, Any] = {  # Qwen3VLVideoProcessor
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "fps": 2,
    "do_sample_frames": True,
}

# Qwen2VLImageProcessor with Qwen3VLVideoProcessor, which does not read the older spelling of a video's bounds.
VOLUME_BOUND = ProcessorDefaults(
    image=QWEN2_VL_IMAGE,
    video=QWEN3_VL_VIDEO,
    frame_sampling="even",
    video_bounds="volume",
    video_pixels_old_spelling=False,
)
# Qwen2VLImageProcessor with Qwen2VLVideoProcessor.
FRAME_BOUND = ProcessorDefaults(
    image=QWEN2_VL_IMAGE,
    video=QWEN2_VL_VIDEO,
    frame_sampling="grouped",
    video_bounds="frame",
    video_pixels_old_spelling=True,
)
