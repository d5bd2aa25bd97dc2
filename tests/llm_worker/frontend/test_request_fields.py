"""Every field of OpenAI's, vLLM's and SGLang's requests has a rule, and the rules are applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
    chat_completion_content_part_image_param,
)
from openai.types.chat import (
    completion_create_params as chat_completion_create_params,
)
from openai.types.responses import (
    EasyInputMessageParam,
    FunctionToolParam,
    ResponseFunctionToolCallParam,
    ResponseInputImageParam,
    ResponseInputTextParam,
    ResponseOutputMessageParam,
    ResponseOutputTextParam,
    ResponseTextConfigParam,
    response_create_params,
)
from openai.types.responses.response_input_param import FunctionCallOutput
from openai.types.shared_params import FunctionDefinition

from tests.llm_worker.frontend.http_client import body, client_of
from tests.llm_worker.frontend.serving import serving
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable, Rule
from vitrine_vlm.llm_worker.frontend.media_fields import IMAGE_PART, IMAGE_URL, TEXT_PART, VIDEO_PART, VIDEO_URL
from vitrine_vlm.llm_worker.frontend.openai_types import ChatRequest, CompletionRequest
from vitrine_vlm.llm_worker.frontend.request_fields import (
    CHAT,
    COMPLETION,
    FUNCTION,
    MESSAGE,
    STREAM_OPTIONS,
    TOOL,
    TOOL_CALL,
)
from vitrine_vlm.llm_worker.frontend.request_parsing import parse_request
from vitrine_vlm.llm_worker.frontend.responses_fields import (
    INPUT_CALL,
    INPUT_CALL_OUTPUT,
    INPUT_IMAGE,
    INPUT_MESSAGE,
    INPUT_TEXT,
    RESPONSES,
    RESPONSES_TOOL,
    TEXT,
)
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.metrics import LlmMetrics

# By ast from each release's own definitions.
OTHERS: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "fields_of_other_servers.json").read_text()
)
TABLES: dict[str, FieldTable] = {
    "chat": CHAT,
    "completion": COMPLETION,
    "message": MESSAGE,
    "image_part": IMAGE_PART,
    "video_part": VIDEO_PART,
    "image_url": IMAGE_URL,
    "video_url": VIDEO_URL,
    "stream_options": STREAM_OPTIONS,
    "responses": RESPONSES,
}
OPENAIS = [
    (chat_completion_create_params.CompletionCreateParamsStreaming, CHAT),
    (completion_create_params.CompletionCreateParamsStreaming, COMPLETION),
    (ChatCompletionAssistantMessageParam, MESSAGE),
    (ChatCompletionToolMessageParam, MESSAGE),
    (ChatCompletionUserMessageParam, MESSAGE),
    (ChatCompletionContentPartTextParam, TEXT_PART),
    (ChatCompletionContentPartImageParam, IMAGE_PART),
    (chat_completion_content_part_image_param.ImageURL, IMAGE_URL),
    (ChatCompletionStreamOptionsParam, STREAM_OPTIONS),
    (response_create_params.ResponseCreateParamsStreaming, RESPONSES),
    (EasyInputMessageParam, INPUT_MESSAGE),
    (ResponseOutputMessageParam, INPUT_MESSAGE),
    (ResponseInputTextParam, INPUT_TEXT),
    (ResponseOutputTextParam, INPUT_TEXT),
    (ResponseInputImageParam, INPUT_IMAGE),
    (ResponseTextConfigParam, TEXT),
    (ChatCompletionFunctionToolParam, TOOL),
    (FunctionDefinition, FUNCTION),
    (ChatCompletionMessageFunctionToolCallParam, TOOL_CALL),
    (ChatCompletionFunctionMessageParam, MESSAGE),
    (ResponseFunctionToolCallParam, INPUT_CALL),
    (FunctionCallOutput, INPUT_CALL_OUTPUT),
    (FunctionToolParam, RESPONSES_TOOL),
]
# Sent by clients that nothing was asked of.
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "best_of": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "n": 1,
    "top_p": 1,
    "min_tokens": 0,
    "min_p": 0,
    "echo": False,
    "skip_special_tokens": True,
    "use_beam_search": False,
    "add_generation_prompt": True,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "bad_words": [],
    "logprob_token_ids": [],
    "chat_template_kwargs": {},
    "mm_processor_kwargs": {"max_pixels": None, "do_resize": True, "videos_kwargs": {"do_sample_frames": True}},
    "media_io_kwargs": {"video": {"num_frames": -1}, "image": {}},
}
# Each would change the answer, and did nothing once.
REFUSED: dict[str, Any] = {
    "extra_key": "mine alone",
    "use_beam_search": True,
    "length_penalty": 2.0,
    "modalities": ["text", "audio"],
    "lora_path": "adapter",
    "web_search_options": {},
}


@pytest.mark.parametrize("kind", [kind for kind, _ in OPENAIS], ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_all_of_openais_fields_have_a_rule(kind: Any) -> None:
    table = next(table for each, table in OPENAIS if each is kind)
    names = get_type_hints(kind)
    assert names and not set(names) - set(table)


@pytest.mark.parametrize(("server", "place"), [(server, place) for server in OTHERS for place in OTHERS[server]])
def test_all_fields_of_other_servers_have_a_rule(server: str, place: str) -> None:
    assert OTHERS[server][place] and not set(OTHERS[server][place]) - set(TABLES[place])


def test_the_types_have_the_honoured_fields_and_no_others() -> None:
    for kind in (ChatRequest, CompletionRequest, ResponsesRequest):
        honoured = {name for name, field in kind.fields.items() if field.rule is Rule.HONOURED}
        assert honoured == set(kind.model_fields)


def parse(**fields: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    parse_request(ChatRequest, json.dumps({"model": "m", "messages": messages, **fields}).encode())


def test_neutral_values_pass() -> None:
    parse(**NEUTRAL)
    parse(**dict.fromkeys(set(CHAT) - {"model", "messages"}))
    parse(tool_choice="auto", modalities=["text"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="leave it out") as caught:
        parse(**{name: REFUSED[name]})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "http://a"}, "resized_width": 64}, "resized_width"),
        ({"type": "image_url", "image_url": {"url": "http://a", "fps": 2}}, "image_url.fps"),
        ({"type": "video_url", "video_url": {"url": "http://a"}, "total_pixels": 4096}, "total_pixels"),
        ({"type": "video_url", "video_url": {"url": "http://a", "sample_fps": 4}}, "video_url.sample_fps"),
        ({"type": "video", "video": ["http://a"], "max_image_tokens": 4}, "max_image_tokens"),
        ({"type": "text", "text": "?", "max_pixels": 4}, "max_pixels"),
        ({"type": "image_url", "image_url": {"url": "http://a"}, "modalities": "audio"}, "modalities"),
        ({"type": "image_url", "image_url": {"url": "http://a", "detail": 5}}, "image_url.detail"),
    ],
)
def test_fields_inside_parts_are_refused_where_they_stand(part: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        content = [{"type": "text", "text": "?"}, part]
        parse(messages=[{"role": "system", "content": "S"}, {"role": "user", "content": content}])
    assert caught.value.param == f"messages.1.content.1.{param}"


@pytest.mark.parametrize(("name", "value"), [("best_of", True), ("echo", 0), ("use_beam_search", 0), ("n", True)])
def test_true_is_not_one_and_zero_is_not_false(name: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(**{name: value})
    assert caught.value.param == name


def test_informative_and_unknown_fields_are_named_without_indices() -> None:
    counted: list[tuple[set[str], set[str]]] = []
    part = {"type": "image_url", "image_url": {"url": "http://a/b", "detail": "high"}, "cache_control": {}}
    messages = [{"role": "user", "content": [part, part], "phase": "final"}]
    fields = {"model": "m", "messages": messages, "user": "me", "max_token": 3, "metadata": None}
    parse_request(
        ChatRequest, json.dumps(fields).encode(), lambda *names: counted.append((set(names[0]), set(names[1])))
    )
    informative, unknown = counted[0]
    assert informative == {"user", "messages.phase", "messages.content.image_url.detail"}
    assert unknown == {"max_token", "messages.content.cache_control"}


def test_the_metric_of_unknown_names_is_bounded() -> None:
    metrics = LlmMetrics()
    metrics.count_unused_fields(["user"], ["typo", "with space", "x" * 65, "naïve"])
    for number in range(300):
        metrics.count_unused_fields([], [f"name_{number}", "typo"])

    def count(field: str, rule: str = "unknown") -> float | None:
        return metrics.registry.get_sample_value("vitrine_llm_unused_fields_total", {"field": field, "rule": rule})

    assert (count("user", "informative"), count("typo"), count("name_0"), count("name_299")) == (1, 301, 1, None)
    assert count("other") == 1 + 300 - 99


async def test_requests_count_the_fields_that_change_nothing(qwen3_vl_folder: Path) -> None:
    async with serving(qwen3_vl_folder) as worker, client_of(worker.served) as client:
        for _ in range(2):
            asked = body(worker, user="me", max_token=3)
            assert (await client.post("/v1/chat/completions", json=asked)).status == 200
        shown = await (await client.get("/metrics")).text()
    assert 'vitrine_llm_unused_fields_total{field="user",rule="informative"} 2.0' in shown
    assert 'vitrine_llm_unused_fields_total{field="max_token",rule="unknown"} 2.0' in shown
