"""transformers' own model in one process, with which all results of the split are compared.

transformers' processor classes cannot be built without torchvision, so the processor is assembled from the parts that
can: the Pillow image processor, the video processor's own `sample_frames`, `smart_resize` and `patchify`, and the
processor's own placeholder replacement. Pictures are resized by torch, as in torchvision, transformers' preferred
backend; videos for Qwen2.5-VL must not need resizing, and what follows them begins at the largest position plus one
(`paper_positions`), as in transformers up to 5.2.
"""

from __future__ import annotations

import importlib
import io
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as smart_resize_image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video
from transformers.video_utils import VideoMetadata

from vitrine_vlm.types import MediaKind

VIDEO_FPS = 2.0


@dataclass(frozen=True)
class Media:
    """One encoded file and its kind."""

    kind: MediaKind
    data: bytes


class Reference:
    """transformers' model and processor parts for one checkpoint folder, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = AutoConfig.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.video_processor = _video_processor(folder, self.config)
        qwen2_5 = self.config.model_type == "qwen2_5_vl"
        processor_class = Qwen2_5_VLProcessor if qwen2_5 else Qwen3VLProcessor
        if qwen2_5:
            self.model.model.get_rope_index = _with_paper_positions(self.model.model.get_rope_index)
        self.processor = processor_class.__new__(processor_class)
        self.processor.tokenizer = self.tokenizer
        self.processor.image_processor = self.image_processor
        self.processor.video_processor = self.video_processor
        self.processor.image_token, self.processor.video_token = "<|image_pad|>", "<|video_pad|>"
        self.processor.vision_start_token, self.processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"

    def inputs(self, text: str, media: list[Media]) -> dict[str, torch.Tensor]:
        """Returns the processor's model inputs for `text`, which has one placeholder per media item."""
        inputs: dict[str, Any] = {}
        images = [self._image(item.data) for item in media if item.kind == "image"]
        image_texts, video_texts = [], []
        if images:
            inputs.update(self.image_processor(images, return_tensors="pt"))
            image_texts = [self.processor.replace_image_token(inputs, index) for index in range(len(images))]
        videos = [self._video(item.data) for item in media if item.kind == "video"]
        if videos:
            inputs["pixel_values_videos"] = torch.cat([patches for patches, _, _ in videos])
            inputs["video_grid_thw"] = torch.tensor([grid for _, grid, _ in videos])
            metadata = {**inputs, "video_metadata": [metadata for _, _, metadata in videos]}
            video_texts = [self.processor.replace_video_token(metadata, index) for index in range(len(videos))]
            if self.config.model_type == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = torch.tensor(
                    [self.video_processor.temporal_patch_size / metadata.sampled_fps for _, _, metadata in videos]
                )
        for token, texts in (("<|image_pad|>", image_texts), ("<|video_pad|>", video_texts)):
            first, *rest = text.split(token)
            text = first + "".join(replacement + piece for replacement, piece in zip(texts, rest, strict=True))
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        kinds = torch.zeros_like(ids)
        kinds[ids == self.config.image_token_id] = 1
        kinds[ids == self.config.video_token_id] = 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **inputs}

    def greedy(self, inputs: dict[str, torch.Tensor], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Returns the greedy continuation: token ids, and log-probabilities [num_tokens, vocab]."""
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.cat(out.logits)
        # min_new_tokens suppresses the end token; the raw argmax must agree for the comparison to be fair.
        return logits.argmax(-1).tolist(), logits.log_softmax(-1)

    def answer(self, question: str, media: list[Media], max_tokens: int) -> str:
        """Returns the greedy answer to a question about `media`, which precede the question in the prompt."""
        content = [*({"type": item.kind} for item in media), {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self.inputs(text, media)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer: str = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer

    def _image(self, data: bytes) -> Image.Image:
        """Returns the picture at its final size, because the processor's resizing by Pillow gives other results."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        size = smart_resize_image(image.height, image.width, **_limits(self.image_processor))
        return Image.fromarray(_resize(pixels[None], size)[0].permute(1, 2, 0).numpy())

    def _video(self, data: bytes) -> tuple[torch.Tensor, list[int], VideoMetadata]:
        with av.open(io.BytesIO(data), "r") as container:
            rate = float(container.streams.video[0].average_rate or VIDEO_FPS)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        metadata = VideoMetadata(total_num_frames=len(frames), fps=rate, duration=len(frames) / rate)
        indices = self.video_processor.sample_frames(metadata, fps=VIDEO_FPS)
        metadata.frames_indices = np.asarray(indices)
        processor = self.video_processor
        pixels = torch.from_numpy(np.stack([frames[int(index)] for index in indices])).permute(0, 3, 1, 2)
        if self.config.model_type != "qwen2_5_vl":
            num_frames, _, height, width = pixels.shape
            size = smart_resize_video(num_frames, height, width, processor.temporal_patch_size, **_limits(processor))
            pixels = _resize(pixels, size)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
        patches, *grid = processor.patchify(
            ((pixels.float() / 255 - mean) / std)[None],
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
        )
        return patches[0], grid, metadata


def paper_positions(positions_3N: torch.Tensor, kinds_N: torch.Tensor) -> torch.Tensor:
    """Moves what follows media to the largest position in front of it plus one (arXiv 2409.12191, section 2.1).

    Args:
        positions_3N: of one prompt, from transformers' `get_rope_index`.
        kinds_N: `mm_token_type_ids`: 0 for text, 1 for images, 2 for videos.
    """
    moved_3N, start, position = positions_3N.clone(), 0, 0
    for _, group in itertools.groupby(kinds_N.tolist()):
        end = start + len(list(group))
        part_3N = positions_3N[:, start:end]
        moved_3N[:, start:end] = part_3N - part_3N.min() + position
        position = int(moved_3N[:, start:end].max()) + 1
        start = end
    return moved_3N


def _with_paper_positions(get_rope_index: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def moved(
        input_ids: torch.Tensor, mm_token_type_ids: torch.Tensor, **known: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(input_ids) == 1, "one prompt at a time"
        positions, _ = get_rope_index(input_ids, mm_token_type_ids, **known)
        moved_3N = paper_positions(positions[:, 0], mm_token_type_ids[0])
        return moved_3N[:, None], (moved_3N.max() + 1 - input_ids.shape[1]).view(1, 1)

    return moved


def _limits(processor: Any) -> dict[str, int]:
    return {
        "factor": processor.patch_size * processor.merge_size,
        "min_pixels": processor.size["shortest_edge"],
        "max_pixels": processor.size["longest_edge"],
    }


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns uint8 pixels [items, 3, height, width] at another (height, width)."""
    return torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)


def _video_processor(folder: Path, config: Any) -> Any:
    if config.model_type != "qwen2_5_vl":
        return Qwen3VLVideoProcessor.from_pretrained(folder)
    return _qwen2_video_processor_class().from_pretrained(folder)


def _qwen2_video_processor_class() -> Any:
    """Returns Qwen2VLVideoProcessor, whose module imports torchvision; the methods used here do not need it."""
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    )
    stand_ins = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl").Qwen2VLVideoProcessor
    finally:
        for name in stand_ins:
            del sys.modules[name]
