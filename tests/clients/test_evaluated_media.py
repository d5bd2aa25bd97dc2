"""Options of media in evaluation harnesses' request bodies give the answers of transformers with these options."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.clients.evaluated import as_jpeg, chat_prompt, greedy, jpeg, text, user, without_data
from tests.integration.media import clip
from vitrine_vlm.sample_models.reference import Media, Reference

CLIP = clip(95, 96, 64, 16)


@pytest.fixture
def reference(qwen3_vl_folder: Path) -> Reference:
    """One of its own, whose processors a test may set."""
    return Reference(qwen3_vl_folder)


def in_part(**options: int) -> Callable[[Media], tuple[dict[str, Any], dict[str, Any]]]:
    """VLMEvalKit's LMDeployAPI: what a dataset says of a picture stands beside its URL."""
    return lambda media: (as_jpeg(media, **options), {})


def of_request(**options: int) -> Callable[[Media], tuple[dict[str, Any], dict[str, Any]]]:
    """VLMEvalKit's adapter for Qwen3-VL."""
    return lambda media: (as_jpeg(media), {"mm_processor_kwargs": options})


@pytest.mark.parametrize("place", [in_part, of_request])
@pytest.mark.parametrize(
    "options",
    [{"max_pixels": 96 * 64}, {"min_pixels": 192 * 160}, {"min_pixels": 32 * 32, "max_pixels": 96 * 64}],
    ids=str,
)
def test_vlmevalkits_bounds_on_pixels(
    random_client: openai.OpenAI,
    random_server: dict[str, Any],
    reference: Reference,
    place: Callable[..., Callable[[Media], tuple[dict[str, Any], dict[str, Any]]]],
    options: dict[str, int],
) -> None:
    media = jpeg(96)
    part, fields = place(**options)(media)
    messages = user(part, text("What is it?"))
    body: Any = {"model": random_server["model"], "messages": messages, "max_tokens": 24, "temperature": 0, "n": 1}
    answer = random_client.chat.completions.create(**body, extra_body=fields)
    size = dict(reference.image_processor.size)
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    reference.image_processor.size = size | {names[name]: value for name, value in options.items()}
    prompt = chat_prompt(reference, without_data(messages))
    assert answer.choices[0].message.content == greedy(reference, prompt, [media])
    inputs = reference.inputs(prompt, [media])
    assert answer.usage is not None and answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    reference.image_processor.size = size
    unbounded = reference.inputs(prompt, [media])
    assert unbounded["input_ids"].shape != inputs["input_ids"].shape, "the option matters"


@pytest.mark.parametrize("num_frames", [2, 8])
def test_lmms_evals_number_of_frames(
    random_client: openai.OpenAI, random_server: dict[str, Any], reference: Reference, num_frames: int
) -> None:
    """With `pass_video_url` the video itself is sent, and the number of frames to take of it."""
    url = f"data:video/mp4;base64,{base64.b64encode(CLIP.data).decode()}"
    messages = user({"type": "video_url", "video_url": {"url": url}}, text("What happens?"))
    body: Any = {"model": random_server["model"], "messages": messages, "max_tokens": 24, "temperature": 0}
    fields = {"media_io_kwargs": {"video": {"num_frames": num_frames}}}
    answer = random_client.chat.completions.create(**body, extra_body=fields)
    sample = reference.video_processor.sample_frames
    reference.video_processor.sample_frames = lambda metadata, fps: sample(metadata, num_frames=num_frames)
    prompt = chat_prompt(reference, without_data(messages, "video"))
    assert answer.choices[0].message.content == greedy(reference, prompt, [CLIP])
    inputs = reference.inputs(prompt, [CLIP])
    assert inputs["video_grid_thw"][0, 0] == num_frames // 2, "the option matters"
    assert answer.usage is not None and answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
