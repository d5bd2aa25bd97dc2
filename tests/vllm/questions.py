"""Questions about pictures and videos, as chat messages for a server and as inputs for transformers."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.questions import held_out_questions
from tests.integration.media import clip, picture
from tests.vllm.checkpoints import CheckpointName, factor_of, model_type_of
from vitrine_vlm.sample_models.reference import Media, Reference

NUM_TOKENS = 16
_MIME = {"image": "image/png", "video": "video/mp4"}


@dataclass(frozen=True)
class Question:
    """The parts of one user message, in their order."""

    parts: tuple[Media | str, ...]

    @property
    def media(self) -> list[Media]:
        return [part for part in self.parts if isinstance(part, Media)]

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        """The chat messages of an OpenAI request, with the media as data: URLs."""
        return [{"role": "user", "content": [_content(part) for part in self.parts]}]

    def expected(self, reference: Reference, num_tokens: int = NUM_TOKENS) -> list[int]:
        """Returns the token ids of transformers' greedy answer, an end token at its end included."""
        content = [
            {"type": part.kind} if isinstance(part, Media) else {"type": "text", "text": part} for part in self.parts
        ]
        text = reference.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids, _ = reference.greedy(reference.inputs(text, self.media), num_tokens)
        ends = [index for index, token_id in enumerate(ids) if token_id == reference.tokenizer.eos_token_id]
        return ids[: ends[0] + 1] if ends else ids


class IntervalReference(Reference):
    """transformers, but the temporal patches of all videos are `interval_s` apart, whatever their frames are."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        super().__init__(folder)
        self._interval_s = interval_s

    def inputs(self, text: str, media: list[Media]) -> dict[str, torch.Tensor]:
        inputs = super().inputs(text, media)
        if "second_per_grid_ts" in inputs:
            inputs["second_per_grid_ts"] = torch.full_like(inputs["second_per_grid_ts"], self._interval_s)
        return inputs


Questions = dict[CheckpointName, list[Question]]
References = dict[CheckpointName, Reference]
Answers = dict[CheckpointName, list[list[int]]]  # token ids of each question


def questions_for(name: CheckpointName, folder: Path, num: int) -> list[Question]:
    """Returns `num` questions that the checkpoint answers with much variety."""
    if name == "tiny":
        return [Question((*asked.media, asked.text)) for asked in held_out_questions(num)]
    return random_questions(folder, num)


def random_questions(folder: Path, num: int, seed: int = 0) -> list[Question]:
    """Returns `num` questions with pictures and videos that no other question has.

    Args:
        folder: the checkpoint. Most media are multiples of its merged tokens, so that they are not resized.
        num: every 8 of them have one of each kind below.
        seed: questions of other seeds have other media.
    """
    factor = factor_of(folder)
    # Of clips of whole seconds vLLM 0.30 takes the frames that transformers takes; others were not tried with it.
    lengths = (16, 24) if model_type_of(folder) == "qwen2_5_vl" else range(9, 25)
    rng = np.random.default_rng(seed)
    seeds = iter(range(10_000 * seed, 10_000 * (seed + 1)))

    def image(least: int = 3, most: int = 6) -> Media:
        width, height = rng.integers(least, most + 1, 2)
        return picture(next(seeds), int(width) * factor, int(height) * factor)

    def video() -> Media:
        width, height = rng.integers(3, 5, 2)
        return clip(next(seeds), int(width) * factor, int(height) * factor, num_frames=int(rng.choice(lengths)))

    def resized() -> Media:
        width, height = rng.integers(3 * factor, 6 * factor, 2)
        return picture(next(seeds), int(width), int(height))

    made = []
    for index in range(num):
        match index % 8:
            case 0:
                parts: tuple[Media | str, ...] = (image(), "What is this?")
            case 1:
                parts = (image(), "First, then", image(), "and", image(), f"compare {index}!")
            case 2:
                same = image()
                parts = (same, "and", same, "are they equal?")
            case 3:
                parts = (video(), "Tell what happens.")
            case 4:
                parts = (f"Question {index}:", image(), "then", video(), "end")
            case 5:  # more tokens than a step of the servers in `fleet` computes
                parts = ("many words come first " * 3, image(9, 12), "done")
            case 6:
                parts = (resized(), "What colour?")
            case _:
                parts = ("Words, and then the picture:", image())
        made.append(Question(parts))
    return made


def _content(part: Media | str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:{_MIME[part.kind]};base64,{base64.b64encode(part.data).decode()}"
    return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": url}}
