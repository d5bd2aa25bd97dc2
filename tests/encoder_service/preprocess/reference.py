"""transformers' own processors with their torch backend, with or without torchvision.

Where torchvision is missing, its import is answered by a stand-in with the functions that the backend calls: `resize`
(for uint8 tensors torchvision calls `torch.nn.functional.interpolate`) and `normalize` (subtract, divide). Everything
else is transformers' code: sizes, sampling, conversion to RGB, fusing of scales, order of patches.
"""

from __future__ import annotations

import enum
import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from transformers import image_processing_backends, video_processing_utils
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

_IMAGE = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
_QWEN2_VIDEO = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
_QWEN3_VIDEO = "transformers.models.qwen3_vl.video_processing_qwen3_vl"


def image_processor(config: dict[str, Any]) -> Any:
    """Qwen2VLImageProcessor, which both families use."""
    return _modules()[_IMAGE].Qwen2VLImageProcessor(**config)


def video_processor(model_type: str, config: dict[str, Any]) -> Any:
    if model_type in ("qwen2_5_vl", "qwen3_omni_moe"):
        return _modules()[_QWEN2_VIDEO].Qwen2VLVideoProcessor(**config)
    return _modules()[_QWEN3_VIDEO].Qwen3VLVideoProcessor(**config)


def metadata(num_frames: int, fps: float) -> VideoMetadata:
    return VideoMetadata(total_num_frames=num_frames, fps=fps)


@functools.cache
def _modules() -> dict[str, ModuleType]:
    names = (_IMAGE, _QWEN2_VIDEO, _QWEN3_VIDEO)
    if is_torchvision_available():
        return {name: importlib.import_module(name) for name in names}
    functional = _functional()
    stand_ins = {
        name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    }
    stand_ins["torchvision.transforms.v2"].functional = functional  # type: ignore[attr-defined]
    stand_ins["torchvision.transforms.v2.functional"] = functional
    for name in list(stand_ins)[1:3]:
        setattr(stand_ins[name.rpartition(".")[0]], name.rpartition(".")[2], stand_ins[name])
    sys.modules.update(stand_ins)
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        for name in (*stand_ins, *names):  # leave no trace for other tests
            sys.modules.pop(name, None)
        for module in (image_processing_backends, video_processing_utils):
            module.tvF = functional
        image_processing_backends.pil_torch_interpolation_mapping = {
            PILImageResampling.BICUBIC: functional.InterpolationMode.BICUBIC
        }


def _functional() -> Any:
    class InterpolationMode(enum.Enum):
        BILINEAR = "bilinear"
        BICUBIC = "bicubic"
        LANCZOS = "lanczos"

    def resize(image: torch.Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool) -> Any:
        assert image.dtype == torch.uint8
        # interpolate takes [N, C, H, W]; torchvision folds leading dimensions (a video's frames) into N.
        flat = image.reshape(-1, *image.shape[-3:])
        resized = torch.nn.functional.interpolate(flat, size, mode=interpolation.value, antialias=antialias)
        return resized.reshape(*image.shape[:-2], *size)

    def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool) -> torch.Tensor:
        mean, std = (torch.as_tensor(values, dtype=image.dtype).view(-1, 1, 1) for values in (mean, std))
        return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)

    def grayscale_to_rgb(image: torch.Tensor) -> torch.Tensor:
        assert image.shape[-3] == 3
        return image

    functional: Any = ModuleType("torchvision.transforms.v2.functional")
    functional.InterpolationMode = InterpolationMode
    functional.resize = resize
    functional.normalize = normalize
    functional.grayscale_to_rgb = grayscale_to_rgb
    return functional
