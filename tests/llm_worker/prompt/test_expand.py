"""Expanded ids and M-RoPE positions equal what transformers' processor and model make of the same request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.media import clip, picture
from vitrine_vlm.errors import BadRequest, PlaceholderMismatch
from vitrine_vlm.llm_worker.families import prompt_config
from vitrine_vlm.llm_worker.prompt.expand import expand_prompt
from vitrine_vlm.llm_worker.prompt.placeholders import plan_placeholders
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import Media, Reference
from vitrine_vlm.types import Layout, MediaKind

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
# Sizes in merged tokens: pictures (width, height), clips (width, height, frames).
CASES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "text": ("only text", []),
    "image": (f"see {IMAGE} there", [(4, 3)]),
    "image_first": (f"{IMAGE}after", [(2, 5)]),
    "image_last": (f"before{IMAGE}", [(5, 2)]),
    "adjacent_images": (f"{IMAGE}{IMAGE}{IMAGE}", [(3, 3), (4, 2), (2, 6)]),
    "bare_adjacent_pads": ("a<|image_pad|><|image_pad|>b", [(3, 3), (4, 2)]),
    "video": (f"watch {VIDEO} now", [(4, 3, 24)]),
    "odd_video": (f"watch {VIDEO} now", [(4, 3, 21)]),
    "videos": (f"{VIDEO} and {VIDEO}", [(3, 3, 16), (4, 2, 33)]),
    "image_then_video": (f"{IMAGE} then {VIDEO} end", [(3, 4), (4, 3, 20)]),
    "video_then_image": (f"{VIDEO} then {IMAGE} end", [(3, 4), (4, 3, 20)]),
}


class Family:
    """One checkpoint, read by transformers and by the worker."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(str(folder))
        self.reference = Reference(folder)
        self.config = prompt_config(checkpoint)
        self.tokenizer = PromptTokenizer(checkpoint)
        vision = self.reference.config.vision_config
        self.factor = vision.patch_size * vision.spatial_merge_size

    def media(self, sizes: list[tuple[int, ...]]) -> list[Media]:
        return [
            picture(seed, size[0] * self.factor, size[1] * self.factor)
            if len(size) == 2
            else clip(seed, size[0] * self.factor, size[1] * self.factor, size[2])
            for seed, size in enumerate(sizes)
        ]

    def layouts(self, inputs: dict[str, torch.Tensor], media: list[Media]) -> list[Layout]:
        """As the encoder would send them."""
        grids = {
            "image": iter(inputs.get("image_grid_thw", torch.zeros(0, 3)).tolist()),
            "video": iter(inputs.get("video_grid_thw", torch.zeros(0, 3)).tolist()),
        }
        seconds = iter(inputs.get("second_per_grid_ts", torch.zeros(9)).tolist())
        layouts = []
        for item in media:
            t, h, w = next(grids[item.kind])
            times: tuple[float, ...] = ()
            second_per_grid_t = 0.0
            if item.kind == "video":
                second_per_grid_t = next(seconds)
                _, _, metadata = self.reference._video(item.data)
                indices = metadata.frames_indices.tolist()
                times = tuple(self.reference_times(indices, metadata.fps))
            num_tokens = t * h * w // self.config.merge_size**2
            layouts.append(Layout(item.kind, (t, h, w), num_tokens, times, second_per_grid_t))
        return layouts

    def reference_times(self, indices: list[int], fps: float) -> list[float]:
        if self.config.tokens_per_second is not None:
            return [0.0] * -(-len(indices) // 2)
        times: list[float] = self.reference.processor._calculate_timestamps(indices, fps, 2)
        return times


@pytest.fixture(scope="module")
def family(checkpoint_folder: Path) -> Family:
    return Family(checkpoint_folder)


@pytest.mark.parametrize("name", list(CASES))
def test_ids_and_positions_equal_transformers(family: Family, name: str) -> None:
    text, sizes = CASES[name]
    media = family.media(sizes)
    inputs = family.reference.inputs(text, media)
    layouts = family.layouts(inputs, media)
    ids = inputs["input_ids"][0].tolist()
    grids = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
    known = {each: inputs[each] for each in grids if each in inputs}

    kinds = [item.kind for item in media]
    one_each = family.tokenizer.encode(text)
    for token_ids in (one_each, ids):
        plan = plan_placeholders(token_ids, kinds, family.config)
        # transformers groups neighbouring placeholders into one item: it has no answer where nothing separates two.
        prompt = expand_prompt(plan, layouts, family.config, family.tokenizer.encode)
        assert prompt.token_ids == ids
        rows = [[False] * layout.num_tokens for layout in layouts]
        for span in prompt.spans:
            placeholder = family.config.placeholder_ids[layouts[span.item_index].kind]
            assert set(ids[span.start : span.start + span.length]) == {placeholder}
            rows[span.item_index][span.first_row : span.first_row + span.length] = [True] * span.length
        assert all(all(each) for each in rows)
        if media and name != "bare_adjacent_pads":
            expected = family.reference.model.model.get_rope_index(inputs["input_ids"], **known)[0][:, 0]
            assert torch.equal(prompt.positions_3N, expected)
            assert prompt.next_position == int(expected.max()) + 1
        elif not media:
            assert torch.equal(prompt.positions_3N, torch.arange(len(ids)).expand(3, -1))
            assert prompt.next_position == len(ids)


def test_the_prefix_is_the_text_before_the_first_placeholder(family: Family) -> None:
    ids = family.tokenizer.encode(f"abc{IMAGE}d")
    plan = plan_placeholders(ids, ["image"], family.config)
    assert plan.num_prefix_tokens == ids.index(family.config.image_token_id)
    assert plan_placeholders(family.tokenizer.encode("abc"), [], family.config).num_prefix_tokens == 3


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("no placeholder", ["image"]),
        (IMAGE, ["image", "image"]),
        (IMAGE, []),
        (IMAGE, ["video"]),
        (VIDEO + IMAGE, ["image"]),
    ],
)
def test_counts_that_cannot_match_fail_before_anything_is_loaded(
    family: Family, text: str, kinds: list[MediaKind]
) -> None:
    with pytest.raises(PlaceholderMismatch):
        plan_placeholders(family.tokenizer.encode(text), kinds, family.config)


@pytest.mark.parametrize("num_pads", [2, 11, 13, 24])
def test_expanded_runs_must_be_those_of_the_items(family: Family, num_pads: int) -> None:
    ids = [1, 2, *[family.config.image_token_id] * num_pads, 3]
    plan = plan_placeholders(ids, ["image"], family.config)
    layout = Layout("image", (1, 6, 8), 12)
    with pytest.raises(PlaceholderMismatch, match=str(num_pads)):
        expand_prompt(plan, [layout], family.config, family.tokenizer.encode)


def test_a_run_torn_apart_is_a_mismatch(family: Family) -> None:
    pad = family.config.image_token_id
    ids = [*[pad] * 6, 1, *[pad] * 6]
    plan = plan_placeholders(ids, ["image"], family.config)
    with pytest.raises(PlaceholderMismatch):
        expand_prompt(plan, [Layout("image", (1, 6, 8), 12)], family.config, family.tokenizer.encode)


def test_timestamps_need_a_tokenizer_and_expanded_videos_do_not(family: Family) -> None:
    layout = Layout("video", (2, 4, 4), 8, (0.5, 1.5), 1.0)
    plan = plan_placeholders([1, family.config.video_token_id, 2], ["video"], family.config)
    if family.config.tokens_per_second is None:
        with pytest.raises(BadRequest, match="expanded"):
            expand_prompt(plan, [layout], family.config, None)
        ids = [1, *[family.config.video_token_id] * 4, 2, *[family.config.video_token_id] * 4]
    else:
        assert len(expand_prompt(plan, [layout], family.config, None).token_ids) == 10
        ids = [1, *[family.config.video_token_id] * 8, 2]
    assert expand_prompt(plan_placeholders(ids, ["video"], family.config), [layout], family.config, None).spans
