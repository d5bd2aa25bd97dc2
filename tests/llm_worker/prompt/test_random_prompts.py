"""Random prompts of text, images and videos against transformers' own get_rope_index, expanded and not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vitrine_vlm.errors import PlaceholderMismatch
from vitrine_vlm.llm_worker.families import prompt_config
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.llm_worker.prompt.expand import expand_prompt
from vitrine_vlm.llm_worker.prompt.placeholders import plan_placeholders
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import paper_positions
from vitrine_vlm.types import Layout

NUM_PROMPTS = 150


@dataclass
class Segments:
    """One prompt: with a placeholder an item, and written out as transformers' processors write it."""

    short_ids: list[int] = field(default_factory=list)
    long_ids: list[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)

    @property
    def kinds(self) -> list[Any]:
        return [layout.kind for layout in self.layouts]


@dataclass(frozen=True)
class Family:
    config: PromptConfig
    tokenizer: PromptTokenizer
    model: Any
    """transformers' model without weights: positions need none."""

    def random_segments(self, rng: random.Random) -> Segments:
        segments = Segments()
        for _ in range(rng.randint(1, 6)):
            match rng.choice(["text", "image", "video"]):
                case "text":
                    self._add_text(segments, [rng.randrange(256) for _ in range(rng.randint(1, 9))])
                case "image":
                    self._add_item(segments, Layout("image", grid := self._grid(rng, 1), self._num_tokens(grid)))
                case "video":
                    grid = self._grid(rng, rng.randint(1, 4))
                    times = tuple(round(rng.uniform(0, 20), 3) for _ in range(grid[0]))
                    seconds = rng.choice([0.25, 1.0, 4 / 3, 2.0])
                    self._add_item(segments, Layout("video", grid, self._num_tokens(grid), times, seconds))
        return segments

    def reference_positions(self, segments: Segments) -> torch.Tensor:
        """[3, N], from the model's get_rope_index, with what follows media behind all of their positions."""
        ids = torch.tensor([segments.long_ids])
        kinds = torch.zeros_like(ids)
        kinds[ids == self.config.image_token_id] = 1
        kinds[ids == self.config.video_token_id] = 2
        known: dict[str, torch.Tensor] = {"mm_token_type_ids": kinds}
        for kind in ("image", "video"):
            grids = [layout.grid_thw for layout in segments.layouts if layout.kind == kind]
            if grids:
                known[f"{kind}_grid_thw"] = torch.tensor(grids)
        if self.config.tokens_per_second is not None and "video" in segments.kinds:
            seconds = [layout.second_per_grid_t for layout in segments.layouts if layout.kind == "video"]
            known["second_per_grid_ts"] = torch.tensor(seconds)
        return paper_positions(self.model.model.get_rope_index(ids, **known)[0][:, 0], kinds[0])

    def _grid(self, rng: random.Random, num_frames: int) -> tuple[int, int, int]:
        size = self.config.merge_size
        # Two rows at least, as every processor makes them: a video of one row looks the same expanded and not.
        return num_frames, rng.randint(1, 5) * size, rng.randint(2, 5) * size

    def _num_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        t, h, w = grid_thw
        return t * h * w // self.config.merge_size**2

    def _add_text(self, segments: Segments, ids: list[int]) -> None:
        segments.short_ids += ids
        segments.long_ids += ids

    def _add_item(self, segments: Segments, layout: Layout) -> None:
        start, end = [self.config.vision_start_token_id], [self.config.vision_end_token_id]
        pad = [self.config.placeholder_ids[layout.kind]]
        run = pad * layout.num_tokens
        if layout.kind == "video" and self.config.tokens_per_second is None:
            frame = start + pad * (layout.num_tokens // layout.grid_thw[0]) + end
            times = [self.tokenizer.encode(f"<{time:.1f} seconds>") for time in layout.timestamps_s]
            run = [token_id for time in times for token_id in time + frame]
        segments.short_ids += start + pad + end
        segments.long_ids += start + run + end
        segments.layouts.append(layout)


@pytest.fixture(scope="module")
def family(checkpoint_folder: Path) -> Family:
    checkpoint = open_checkpoint(str(checkpoint_folder))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(checkpoint_folder))
    return Family(prompt_config(checkpoint), PromptTokenizer(checkpoint), model)


def prompts(family: Family) -> Iterator[Segments]:
    rng = random.Random(0)
    for _ in range(NUM_PROMPTS):
        yield family.random_segments(rng)


def test_short_and_expanded_prompts_become_the_same_one_with_transformers_positions(family: Family) -> None:
    num_with_media = 0
    for segments in prompts(family):
        for ids in (segments.short_ids, segments.long_ids):
            plan = plan_placeholders(ids, segments.kinds, family.config)
            prompt = expand_prompt(plan, segments.layouts, family.config, family.tokenizer.encode)
            assert prompt.token_ids == segments.long_ids
            if segments.layouts:
                expected = family.reference_positions(segments)
                assert torch.equal(prompt.positions_3N, expected)
                assert prompt.next_position == int(expected.max()) + 1
            rows = [(span.item_index, span.first_row + index) for span in prompt.spans for index in range(span.length)]
            assert rows == [
                (item, row) for item, layout in enumerate(segments.layouts) for row in range(layout.num_tokens)
            ]
        num_with_media += bool(segments.layouts)
    assert num_with_media > NUM_PROMPTS // 2


def test_one_row_too_few_or_too_many_is_a_mismatch(family: Family) -> None:
    rng = random.Random(1)
    num_checked = 0
    for segments in prompts(family):
        pads = [
            position
            for position, token in enumerate(segments.long_ids)
            if token in (family.config.image_token_id, family.config.video_token_id)
        ]
        # Two rows at least stay of each kind, so that the prompt cannot be taken for an unexpanded one.
        if not segments.layouts or any(layout.num_tokens < 3 for layout in segments.layouts):
            continue
        position = rng.choice(pads)
        doubled = segments.long_ids[: position + 1] + segments.long_ids[position:]
        dropped = segments.long_ids[:position] + segments.long_ids[position + 1 :]
        for ids in (doubled, dropped):
            plan = plan_placeholders(ids, segments.kinds, family.config)
            with pytest.raises(PlaceholderMismatch):
                expand_prompt(plan, segments.layouts, family.config, family.tokenizer.encode)
            num_checked += 1
    assert num_checked > 20
