"""What no client needs and what would take long is refused, with the numbers and the field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.llm_worker.frontend.http_client import Client, body
from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.sampling_checks import MAX_LOGIT_BIAS_TOKENS, MAX_STOP_TOKEN_IDS
from vitrine_vlm.llm_worker.frontend.openai_types import MAX_MESSAGES, MAX_PARTS
from vitrine_vlm.llm_worker.frontend.tool_types import MAX_TOOLS
from vitrine_vlm.llm_worker.generation.stop_strings import MAX_STOP_CHARS, MAX_STOP_STRINGS
from vitrine_vlm.llm_worker.prompt import chat_template
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.wire import generation_from_proto
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.service_runtime.json_limits import MAX_VALUES
from vitrine_vlm.service_runtime.tenants import CacheScope

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "Hi"}
FUNCTION_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
MIXED = [name for index in range(1000) for name in (index, f"a{index}")]


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("route", "fields", "param", "message"),
    [
        (CHAT, {"messages": [USER] * (MAX_MESSAGES + 1)}, "messages", "at most 8192 items"),
        (
            CHAT,
            {"messages": [{**USER, "content": [{"type": "text", "text": ""}] * (MAX_PARTS + 1)}]},
            None,
            "at most 8192",
        ),
        (CHAT, {"tools": [tool({})] * (MAX_TOOLS + 1)}, "tools", "at most 1024 items"),
        (CHAT, {"functions": [{"name": "f"}] * (MAX_TOOLS + 1)}, "functions", "at most 1024 items"),
        (CHAT, {"tools": [tool({"title": "a" * 262_144})]}, "tools.0.function.parameters", "at most 262144 are"),
        (CHAT, {"tools": [tool({"enum": [1] * 8192})]}, "tools.0.function.parameters", "at most 8192 are accepted"),
        (CHAT, {"tools": [tool({"required": MIXED})]}, "tools.0.function.parameters", "more than strings"),
        (CHAT, {"tools": [tool({"anyOf": [{"type": MIXED}]})]}, "tools.0.function.parameters", "more than strings"),
        (CHAT, {"tools": [tool({"dependentRequired": {"a": MIXED}})]}, "tools.0.function.parameters", "more than"),
        (CHAT, {"stop": ["a"] * (MAX_STOP_STRINGS + 1)}, "stop", "at most 256 items"),
        (CHAT, {"stop": "a" * (MAX_STOP_CHARS + 1)}, "stop", "4097 characters: its strings may have 4096 together"),
        (CHAT, {"stop_token_ids": list(range(MAX_STOP_TOKEN_IDS + 1))}, "stop_token_ids", "at most 1024 are"),
        (
            CHAT,
            {"logit_bias": {str(each): 1 for each in range(MAX_LOGIT_BIAS_TOKENS + 1)}},
            "logit_bias",
            "16385 entries",
        ),
        (CHAT, {"bad_words": ["a" * 257]}, "bad_words", "257 characters: at most 256 are accepted"),
        (COMPLETIONS, {"prompt": [1] * MAX_VALUES}, None, "more than 1000000 values"),
        (RESPONSES, {"input": [USER, *[FUNCTION_CALL] * MAX_MESSAGES]}, "input", "at most 8192 items"),
        (RESPONSES, {"metadata": {str(each): "" for each in range(257)}}, "metadata", "at most 256 items"),
        ("/tokenize", {"messages": [USER] * (MAX_MESSAGES + 1)}, "messages", "at most 8192 items"),
    ],
)
async def test_limits(
    client: Client, worker: LocalWorker, route: str, fields: dict[str, Any], param: str | None, message: str
) -> None:
    asked = body(worker) if route == CHAT else {"model": worker.served.name, "input": "Hi"}
    if route != RESPONSES:
        asked.pop("input", None)
    response = await client.post(route, json=asked | fields)
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "invalid_request")
    assert message in error["message"] and (param is None or error["param"] == param)


async def test_texts_that_cannot_fit(client: Client, worker: LocalWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a" * 60_000  # of the tokenizer's tokens the longest has 13 characters, the context 512 tokens
    sent = [
        (CHAT, body(worker, messages=[{"role": "user", "content": text}])),
        (COMPLETIONS, {"model": worker.served.name, "prompt": ["Hi", text], "max_tokens": 1}),
        (RESPONSES, {"model": worker.served.name, "input": text}),
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
    ]
    for route, asked in sent:
        response = await client.post(route, json=asked)
        assert (response.status, (await response.json())["error"]["code"]) == (400, "context_length_exceeded")
    truncated = {"model": worker.served.name, "prompt": text, "max_tokens": 1, "truncate_prompt_tokens": 5}
    assert (await (await client.post(COMPLETIONS, json=truncated)).json())["usage"]["prompt_tokens"] == 5
    monkeypatch.setattr(chat_template, "_MAX_TEXT_CHARS", 59_999)
    response = await client.post(CHAT, json=sent[0][1])
    assert "at most 59999 are read" in (await response.json())["error"]["message"]


async def test_many_calls_of_one_answer(client: Client, worker: LocalWorker) -> None:
    """Each joins the message in front of it, in a time that grows with their number only."""
    asked = {"model": worker.served.name, "input": [USER, *[FUNCTION_CALL] * 3000]}
    response = await client.post(RESPONSES, json=asked)
    assert (await response.json())["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("name", "values", "most"),
    [
        ("stop", ["a"] * 257, 256),
        ("stop_token_ids", [0] * (MAX_VALUES + 1), MAX_VALUES),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS_TOKENS + 1), 1.0), MAX_LOGIT_BIAS_TOKENS),
        ("bad_words", [llm_pb2.TokenIds(ids=[1])] * 129, 128),
        ("allowed_token_ids", llm_pb2.TokenIds(ids=[0] * (MAX_VALUES + 1)), MAX_VALUES),
    ],
)
def test_limits_of_messages(name: str, values: Any, most: int) -> None:
    with pytest.raises(BadRequest, match=f"{name} has [0-9]+ entries: at most {most} are accepted") as caught:
        generation_from_proto(
            "",
            llm_pb2.Prompt(text="Hi"),
            llm_pb2.SamplingParams(**{name: values}),
            SamplingDefaults(1.0, 1.0, 0, frozenset()),
            CacheScope(),
        )
    assert caught.value.param == name
