"""Packs samples into batches, with the same prompts and pixels as in the services, and the answers as targets.

Shapes: N tokens of all examples, B examples, P patches, D = 3 * patch_size ** 2 values of one frame's patch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.vision_utils import get_vision_position_ids

from vitrine_vlm.encoder_service.families import processor_settings
from vitrine_vlm.encoder_service.preprocess.frame_sampling import sample_frames, timestamps_s
from vitrine_vlm.encoder_service.preprocess.patchify import cut_patches, resize
from vitrine_vlm.encoder_service.preprocess.smart_resize import resized_image_size, resized_video_size
from vitrine_vlm.llm_worker.families import prompt_config
from vitrine_vlm.llm_worker.prompt.expand import expand_prompt
from vitrine_vlm.llm_worker.prompt.placeholders import plan_placeholders
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.tiny_vlm.data.generator import draw_question, draw_sample
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Clip, Question, Sample
from vitrine_vlm.types import Layout, MediaKind

NO_TARGET = -100
_MAX_TURNS = 6
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_PLACEHOLDERS: dict[MediaKind, str] = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


@dataclass(frozen=True)
class Batch:
    """Packed examples.

    token_ids [N]; positions_3N: M-RoPE; targets [N]: the token that should follow, NO_TARGET outside of answers;
    cu_seqlens [B + 1], int32.
    pictures [P, D] and clips [P, 2 * D]: uint8 patches (a picture's second frame, equal to the first, is left out);
    picture_grids, clip_grids [items, 3]: their grid_thw.
    patch_positions [P, 2]: row and column of every patch, pictures first.
    """

    token_ids: torch.Tensor
    positions_3N: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    pictures: torch.Tensor
    picture_grids: torch.Tensor
    clips: torch.Tensor
    clip_grids: torch.Tensor
    patch_positions: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in fields.items()})


@dataclass(frozen=True)
class _Example:
    token_ids: list[int]
    positions_3N: torch.Tensor
    targets: list[int]
    media: list[tuple[Layout, torch.Tensor]]


class BatchMaker:
    """Makes batches for the checkpoint in `folder`, of which only the configs and the tokenizer are read."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(str(folder))
        self._settings = processor_settings(checkpoint)
        self._prompt_config = prompt_config(checkpoint)
        self._tokenizer = PromptTokenizer(checkpoint)

    def training_batch(self, indices: Sequence[int]) -> Batch:
        """Returns the training samples of these indices, each as a conversation of up to six questions."""
        examples = []
        for index in indices:
            sample = draw_sample("train", index)
            rng = random.Random(index)
            turns = rng.sample(sample.questions, min(_MAX_TURNS, len(sample.questions)))
            preamble = _SYSTEM if rng.random() < 0.15 else ""
            examples.append(self._example(sample, turns, preamble, question_first=rng.random() < 0.2))
        return self._packed(examples)

    def heldout_batch(self, indices: Sequence[int]) -> Batch:
        """Returns the held-out questions of these indices, each as one example."""
        drawn = (draw_question("heldout", index) for index in indices)
        return self._packed([self._example(sample, [question], "", question_first=False) for sample, question in drawn])

    def _example(self, sample: Sample, turns: Sequence[Question], preamble: str, *, question_first: bool) -> _Example:
        media = [self._picture(each) if isinstance(each, Image.Image) else self._clip(each) for each in sample.media]
        layouts = [layout for layout, _ in media]
        placeholders = "".join(_PLACEHOLDERS[layout.kind] for layout in layouts)
        encode = self._tokenizer.encode
        token_ids: list[int] = []
        targets: list[int] = []
        for index, turn in enumerate(turns):
            where, before = (placeholders, preamble) if index == 0 else ("", "")
            asked = turn.text + where if question_first else where + turn.text
            prompt = encode(f"{before}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")
            answer = encode(f"{turn.answer}<|im_end|>")
            # Every token of the answer is the target of the position before it.
            targets += [NO_TARGET] * (len(prompt) - 1) + answer + [NO_TARGET]
            token_ids += prompt + answer
            if index < len(turns) - 1:
                line_end = encode("\n")
                token_ids += line_end
                targets += [NO_TARGET] * len(line_end)
        kinds = [layout.kind for layout in layouts]
        plan = plan_placeholders(token_ids, kinds, self._prompt_config)
        expanded = expand_prompt(plan, layouts, self._prompt_config, encode)
        # All placeholders are before the first answer, so the tokens that replace them have no targets.
        targets = [NO_TARGET] * (len(expanded.token_ids) - len(token_ids)) + targets
        return _Example(expanded.token_ids, expanded.positions_3N, targets, media)

    def _packed(self, examples: Sequence[_Example]) -> Batch:
        pictures, picture_grids = _media(examples, "image")
        clips, clip_grids = _media(examples, "video")
        lengths = [len(example.token_ids) for example in examples]
        return Batch(
            token_ids=torch.tensor([token for example in examples for token in example.token_ids]),
            positions_3N=torch.cat([example.positions_3N for example in examples], dim=1),
            targets=torch.tensor([target for example in examples for target in example.targets]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            pictures=pictures,
            picture_grids=picture_grids,
            clips=clips,
            clip_grids=clip_grids,
            # Computed here, because transformers computes them in a loop over the items, which would stall the GPU.
            patch_positions=get_vision_position_ids(torch.cat([picture_grids, clip_grids]), self._settings.merge_size),
        )

    def _picture(self, image: Image.Image) -> tuple[Layout, torch.Tensor]:
        height, width = resized_image_size(self._settings, image.height, image.width)
        one_frame = dataclasses.replace(self._settings, temporal_patch_size=1)
        patches = cut_patches(resize(_pixels(image), height, width)[None], one_frame)
        return self._layout("image", (1, height, width), ()), patches

    def _clip(self, clip: Clip) -> tuple[Layout, torch.Tensor]:
        group = self._settings.temporal_patch_size
        indices = sample_frames(self._settings, clip.num_frames, clip.fps)
        height, width = resized_video_size(self._settings, len(indices), clip.size[1], clip.size[0])
        frames = [resize(_pixels(clip.frame(index)), height, width) for index in indices]
        frames += frames[-1:] * (-len(frames) % group)
        times = timestamps_s(indices, clip.fps, group)
        layout = self._layout("video", (len(frames) // group, height, width), times)
        return layout, cut_patches(torch.stack(frames), self._settings)

    def _layout(self, kind: MediaKind, thw: tuple[int, int, int], times: tuple[float, ...]) -> Layout:
        patch, merge = self._settings.patch_size, self._settings.merge_size
        t, h, w = thw[0], thw[1] // patch, thw[2] // patch
        return Layout(kind, (t, h, w), t * h * w // merge**2, times)


def _pixels(image: Image.Image) -> torch.Tensor:
    """Returns the pixels [3, height, width], uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _media(examples: Sequence[_Example], kind: MediaKind) -> tuple[torch.Tensor, torch.Tensor]:
    found = [each for example in examples for each in example.media if each[0].kind == kind]
    if not found:
        return torch.empty((0, 0), dtype=torch.uint8), torch.empty((0, 3), dtype=torch.int64)
    return torch.cat([patches for _, patches in found]), torch.tensor([layout.grid_thw for layout, _ in found])
