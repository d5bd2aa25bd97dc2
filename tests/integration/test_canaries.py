"""Sequences of requests that go wrong first where memory is used again: pools, leases, buffers, batches, KV blocks."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Sequence

import aiohttp
import pytest
import torch
from PIL import Image

from tests.integration.fleet import TRANSPORTS, Fleet
from tests.integration.media import clip, picture
from vitrine_vlm.encoder_service.families import processor_settings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import Media, Reference

NUM_TOKENS = 12
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def single_color(width: int, height: int, color: str) -> Media:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return Media("image", file.getvalue())


class Expected:
    """transformers' answers, each computed once; pixels of images that must be resized come from our preprocessing."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        settings = processor_settings(open_checkpoint(str(reference.folder)))
        self._preprocessor = Preprocessor(settings, MediaLimits())
        self._known: dict[tuple[str, tuple[bytes, ...]], list[int]] = {}

    def __call__(self, text: str, media: Sequence[Media]) -> list[int]:
        key = (text, tuple(item.data for item in media))
        if key not in self._known:
            inputs = self._reference.inputs(text, list(media))
            images = [self._preprocessor.open("image", item.data) for item in media if item.kind == "image"]
            if images:
                assert inputs["image_grid_thw"].tolist() == [list(image.layout.grid_thw) for image in images]
                inputs["pixel_values"] = torch.cat([image.patches() for image in images])
            self._known[key] = self._reference.greedy(inputs, NUM_TOKENS)[0]
        return self._known[key]


@pytest.fixture(scope="session")
def expected(reference: Reference) -> Expected:
    return Expected(reference)


async def ask(fleet: Fleet, transport: str, text: str, media: Sequence[Media]) -> list[int]:
    return (await fleet.worker(transport).generate(text, media, NUM_TOKENS)).token_ids


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_one_after_another(fleet: Fleet, expected: Expected, transport: str) -> None:
    side = fleet.factor
    small, large = picture(1, 3 * side, 3 * side), picture(2, 14 * side, 14 * side)
    same_shape = picture(3, 4 * side, 6 * side), picture(4, 4 * side, 6 * side)
    equal_patches = picture(5, 2 * side, 12 * side), picture(6, 8 * side, 3 * side)
    sequences = [
        [small, large, small],
        [same_shape[0], same_shape[1], same_shape[0]],
        [*equal_patches, equal_patches[0]],
        [single_color(1, 1, "red"), single_color(8, 8, "blue"), large],
    ]
    for sequence in sequences:
        for media in sequence:
            assert await ask(fleet, transport, f"{IMAGE}What?", [media]) == expected(f"{IMAGE}What?", [media])
    twice = [same_shape[0], same_shape[1], same_shape[0]]
    text = f"{IMAGE}{IMAGE}{IMAGE}Which two are equal?"
    assert await ask(fleet, transport, text, twice) == expected(text, twice)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_two_hundred_at_once(fleet: Fleet, expected: Expected, transport: str) -> None:
    side = fleet.factor
    pictures = [picture(seed, (2 + seed % 4) * side, (3 + seed % 3) * side) for seed in range(8)]
    video = clip(9, 3 * side, 3 * side, 16)
    kinds: list[tuple[str, list[Media]]] = [(f"{IMAGE}What is {seed}?", [each]) for seed, each in enumerate(pictures)]
    kinds += [("Only text.", []), (f"{VIDEO}And now?", [video]), (f"{IMAGE} or {IMAGE}?", [pictures[0], pictures[1]])]
    requests = [kinds[index % len(kinds)] for index in range(200)]

    answers = await asyncio.gather(*(ask(fleet, transport, text, media) for text, media in requests))

    assert answers == [expected(text, media) for text, media in requests]
    url = f"http://{fleet.worker_processes[transport].addresses['http']}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        metrics = await response.text()
    assert re.search(r"^vitrine_llm_kv_blocks_used 0(\.0)?$", metrics, re.MULTILINE)
