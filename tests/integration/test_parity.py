"""Every token that comes out of the split equals what transformers computes from the same checkpoint in one process.

Three families, both transports, real processes: one encoder and two LLM workers a family. The workers prefill in
chunks of 48 tokens, so most prompts with media cross a chunk border inside an image.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from tests.integration.fleet import TRANSPORTS, Fleet
from tests.integration.media import clip, picture
from vitrine_vlm.sample_models.reference import Media, Reference

NUM_TOKENS = 64
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True)
class Case:
    """A prompt and its media; sizes are in merged tokens (of `factor` pixels) so that no family has to resize."""

    text: str
    images: tuple[tuple[int, int, int], ...] = ()  # seed, width, height
    video: tuple[int, int, int, int] | None = None  # seed, width, height, frames

    def media(self, factor: int) -> list[Media]:
        items = [picture(seed, width * factor, height * factor) for seed, width, height in self.images]
        if self.video is not None:
            seed, width, height, num_frames = self.video
            items.append(clip(seed, width * factor, height * factor, num_frames))
        return items


CASES = {
    "text_only": Case("The quick brown fox jumps over the lazy dog."),
    "one_image": Case(f"Look: {IMAGE} what is this?", images=((1, 4, 3),)),
    "three_images": Case(
        f"First {IMAGE} second {IMAGE} third {IMAGE} compare!", images=((2, 3, 4), (3, 6, 2), (4, 5, 5))
    ),
    "video": Case(f"Watch {VIDEO} now tell.", video=(5, 4, 3, 24)),
    "image_and_video": Case(f"{IMAGE} then {VIDEO} end", images=((6, 3, 3),), video=(7, 3, 4, 17)),
    "image_first": Case(f"{IMAGE}And after it the words.", images=((8, 5, 3),)),
    "image_last": Case(f"Words, and then the image: {IMAGE}", images=((9, 3, 5),)),
    "two_equal_images": Case(f"{IMAGE} and {IMAGE} are they equal?", images=((10, 4, 4), (10, 4, 4))),
    "long_with_image_across_chunks": Case(f"{'many words come first ' * 3}{IMAGE} done", images=((11, 10, 9),)),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", list(CASES))
async def test_greedy_tokens_equal_transformers(fleet: Fleet, reference: Reference, name: str, transport: str) -> None:
    case = CASES[name]
    media = case.media(fleet.factor)
    expected_ids, expected_logprobs = reference.greedy(reference.inputs(case.text, media), NUM_TOKENS)

    generated = await fleet.worker(transport).generate(case.text, media, NUM_TOKENS, logprobs=5)

    assert generated.token_ids == expected_ids
    for step, logprobs in enumerate(generated.logprobs):
        assert logprobs.sampled.logprob == pytest.approx(float(expected_logprobs[step, expected_ids[step]]), abs=1e-3)
        for alternative in logprobs.top:
            expected = float(expected_logprobs[step, alternative.token_id])
            assert alternative.logprob == pytest.approx(expected, abs=1e-3)


async def test_requests_in_one_batch_do_not_touch_each_other(fleet: Fleet, reference: Reference) -> None:
    names = ["one_image", "three_images", "text_only", "video"]
    media = [CASES[name].media(fleet.factor) for name in names]
    expected = [
        reference.greedy(reference.inputs(CASES[name].text, items), NUM_TOKENS)[0]
        for name, items in zip(names, media, strict=True)
    ]

    for transport in ("shm", "grpc"):
        worker = fleet.worker(transport)
        generated = await asyncio.gather(
            *(worker.generate(CASES[name].text, items, NUM_TOKENS) for name, items in zip(names, media, strict=True))
        )
        assert [result.token_ids for result in generated] == expected


async def test_token_ids_in_expanded_or_not_give_the_same_tokens(fleet: Fleet, reference: Reference) -> None:
    case = CASES["three_images"]
    media = case.media(fleet.factor)
    inputs = reference.inputs(case.text, media)
    expected, _ = reference.greedy(inputs, NUM_TOKENS)
    one_placeholder_each = reference.tokenizer(case.text, add_special_tokens=False)["input_ids"]
    expanded = inputs["input_ids"][0].tolist()
    assert len(expanded) > len(one_placeholder_each)

    worker = fleet.worker("shm")
    for prompt in (one_placeholder_each, expanded):
        assert (await worker.generate(prompt, media, NUM_TOKENS)).token_ids == expected


async def test_expanded_video_token_ids_give_the_same_tokens(fleet: Fleet, reference: Reference) -> None:
    case = CASES["image_and_video"]
    media = case.media(fleet.factor)
    inputs = reference.inputs(case.text, media)
    expected, _ = reference.greedy(inputs, NUM_TOKENS)

    generated = await fleet.worker("grpc").generate(inputs["input_ids"][0].tolist(), media, NUM_TOKENS)

    assert generated.token_ids == expected


async def test_prefill_returns_the_first_token(fleet: Fleet, reference: Reference) -> None:
    case = CASES["one_image"]
    media = case.media(fleet.factor)
    expected, logprobs = reference.greedy(reference.inputs(case.text, media), 1)

    first = await fleet.worker("shm").prefill(case.text, media)

    assert first.first_token.sampled.token_id == expected[0]
    assert first.first_token.sampled.logprob == pytest.approx(float(logprobs[0, expected[0]]), abs=1e-3)


async def test_another_picture_gives_another_answer(fleet: Fleet) -> None:
    """The comparison above can fail: the rows do reach the decoder."""
    text = CASES["one_image"].text
    answers = [
        (await fleet.worker("shm").generate(text, [picture(seed, 4 * fleet.factor, 3 * fleet.factor)], 16)).token_ids
        for seed in (1, 2)
    ]
    assert answers[0] != answers[1]
