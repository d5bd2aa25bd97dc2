"""Parsing of OpenAI requests: errors name the field; prompts, media and sampling are what a request says."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.frontend.openai_prompt import chat_to_generation, completion_to_generations
from vitrine_vlm.llm_worker.frontend.openai_types import ChatRequest, CompletionRequest
from vitrine_vlm.llm_worker.frontend.request_parsing import parse_request
from vitrine_vlm.llm_worker.prompt.client_text import ChatText
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

DEFAULTS = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, eos_token_ids=frozenset({258}))
USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({"model": "m", "messages": [USER], **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages.0.role"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url.url",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ")


def test_a_list_that_is_too_long_or_short_is_no_wrong_type() -> None:
    for frames, problem in (([], "at least 1 item"), (["data:,"] * 2049, "at most 2048 items"), (5, "valid string")):
        with pytest.raises(BadRequest, match=problem) as caught:
            chat(messages=[{"role": "user", "content": [{"type": "video", "video": frames}]}])
        assert caught.value.param == "messages.0.content.0.video"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff"])
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_request(ChatRequest, body)


def test_chat_becomes_a_prompt_with_its_media_in_order(qwen3_vl_folder: Path) -> None:
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    data = base64.b64encode(b"bytes of a picture").decode()
    content = [
        {"type": "text", "text": "A"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "video_url", "video_url": {"url": "http://a/v.mp4", "fps": 4}},
        {"type": "text", "text": "B"},
    ]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": content}]
    generation = chat_to_generation(
        chat(messages=messages, stop="x", max_completion_tokens=5), tokenizer, DEFAULTS, "id"
    )
    assert isinstance(generation.prompt, ChatText)
    text = generation.prompt.text
    assert (
        text.index("S") < text.index("A") < text.index("<|image_pad|>") < text.index("<|video_pad|>") < text.index("B<")
    )
    image, video = generation.media
    assert (image.kind, image.data, video.kind, video.url, video.options.fps) == (
        "image",
        b"bytes of a picture",
        "video",
        "http://a/v.mp4",
        4,
    )
    assert generation.stop == ("x",)
    assert generation.sampling.max_tokens == 5
    with pytest.raises(BadRequest, match="without a tokenizer"):
        chat_to_generation(chat(), None, DEFAULTS, "id")


def test_developer_is_system_to_the_template(qwen3_vl_folder: Path) -> None:
    """Qwen's templates leave out messages of roles that they do not know."""
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    for content in ("Be brief", [{"type": "text", "text": "Be brief"}]):
        texts = [
            str(
                chat_to_generation(
                    chat(messages=[{"role": role, "content": content}, USER]), tokenizer, DEFAULTS, "id"
                ).prompt
            )
            for role in ("developer", "system")
        ]
        assert texts[0] == texts[1]
        assert "<|im_start|>system\\nBe brief<|im_end|>" in texts[0]


def test_sampling_comes_from_the_request_or_else_from_the_checkpoint(qwen3_vl_folder: Path) -> None:
    body = {"model": "m", "prompt": [1, 2]}
    request = parse_request(CompletionRequest, json.dumps(body).encode())
    sampling = completion_to_generations(request, None, DEFAULTS, "id")[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.8, 20)
    assert sampling.stop_token_ids == {258}
    fields = {"temperature": 0, "top_p": 0.5, "top_k": -1, "seed": 3, "stop_token_ids": [7], "ignore_eos": True}
    request = parse_request(CompletionRequest, json.dumps(body | fields).encode())
    sampling = completion_to_generations(request, None, DEFAULTS, "id")[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 0, 3)
    assert sampling.stop_token_ids == {7}


def completion(prompt: Any, **fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": prompt, **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [
        ("12", ["12"]),
        (["12"], ["12"]),
        (["a", "b"], ["a", "b"]),
        ([12], [[12]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ],
)
def test_prompts_are_one_or_several(prompt: Any, taken: list[Any]) -> None:
    assert completion(prompt).prompts == taken


def test_several_prompts_have_no_media() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://a/b"}}
    with pytest.raises(BadRequest, match="2 prompts") as caught:
        completion_to_generations(completion(["a", "b"], media=[part]), None, DEFAULTS, "id")
    assert caught.value.param == "media"


@pytest.mark.parametrize("prompt", [["a", 1], [1.5], [True], [["a"]], {"text": "a"}, ["a"] * 129, None])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        completion(prompt)
    assert (caught.value.param or "").split(".")[0] == "prompt"


def test_null_is_left_out() -> None:
    names = set(CompletionRequest.model_fields) - {"model", "prompt"}
    assert completion("a", **dict.fromkeys(names)) == completion("a")
    assert not completion("a", stream_options={"include_usage": None}).stream_options.include_usage


def test_broken_base64_is_refused(qwen3_vl_folder: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}
    body = {"model": "m", "prompt": "p", "media": [part]}
    with pytest.raises(BadRequest, match="base64"):
        completion_to_generations(parse_request(CompletionRequest, json.dumps(body).encode()), None, DEFAULTS, "id")
