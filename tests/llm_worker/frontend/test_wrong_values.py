"""Wrong values of every field get 400 with `param`, and never 500, over the real port."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.llm_worker.frontend.http_client import Client
from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.frontend.field_rules import Field, FieldTable, Rule
from vitrine_vlm.llm_worker.frontend.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestBody,
    TokenizeRequest,
)
from vitrine_vlm.llm_worker.frontend.request_parsing import parse_request
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,QUJD", "fps": 1}}
FRAMES = {"type": "video", "video": ["data:image/png;base64,QUJD", "http://a"], "fps": 1, "size": {}}
# With tables of their own inside.
OPTIONS = {
    "mm_processor_kwargs": {"size": {}, "images_kwargs": {}, "videos_kwargs": {"size": {}}},
    "media_io_kwargs": {"video": {}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "?"}, IMAGE, VIDEO, FRAMES]},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}]
INPUT = [
    {
        "role": "user",
        "content": [{"type": "input_text", "text": "?"}, {"type": "input_image", "image_url": "http://a"}],
    },
    {"role": "assistant", "content": [{"type": "output_text", "text": "!"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "!"}]},
]
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}, "structured_outputs": {}}
ROUTES: dict[str, tuple[type[RequestBody], dict[str, Any]]] = {
    "/v1/chat/completions": (
        ChatRequest,
        {
            "model": "m",
            "messages": MESSAGES,
            "stream_options": {},
            "tools": TOOLS,
            "functions": [dict(FUNCTION)],
            **OPTIONS,
            **FORMAT,
        },
    ),
    "/v1/completions": (
        CompletionRequest,
        {"model": "m", "prompt": "Hi", "media": [IMAGE], "stream_options": {}, **FORMAT},
    ),
    "/v1/responses": (
        ResponsesRequest,
        {
            "model": "m",
            "input": INPUT,
            "text": {"format": {"type": "text"}},
            "tools": [{"type": "function", **FUNCTION}],
        },
    ),
    "/tokenize": (TokenizeRequest, {"messages": MESSAGES, "tools": TOOLS}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}
# Requests without media, so that each accepted value meets the engine; sampled, so that all parameters count; and with
# little of the context left, so that the largest max_tokens is no long answer.
_LONG = "x" * 470
RUNNABLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": _LONG}], "max_tokens": 1, "temperature": 1},
    "/v1/completions": {"prompt": _LONG, "max_tokens": 1, "temperature": 1},
    "/v1/responses": {"input": _LONG, "max_output_tokens": 1, "temperature": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


VALUES: list[Any] = [
    *(True, False, -1, 0, 1, 2, 21, 2**31, 2**63, -(2**63) - 1, 10**30, 1.5, -0.5, 1e300, 1e-300, *NO_NUMBERS),
    *("", "x", "5", "true", "\x00", "猫" * 3000, "https://[", "data:image/png;base64,!"),
    *([], [1], [-1], [10**30], [1.5], ["x"], [""], [None], [[]], [{}], ["x"] * 3000),
    *({}, {"a": 1}, {"type": "x"}, {"url": 5}, {"1": 1e300}, nested(50)),
]


def random_value(random_: random.Random, depth: int = 3) -> Any:
    match random_.randrange(8 if depth else 5):
        case 0:
            return random_.choice([None, True, False])
        case 1:
            return random_.randint(-(10 ** random_.randrange(20)), 10 ** random_.randrange(20))
        case 2:
            return random_.uniform(-(10.0 ** random_.randrange(10)), 10.0 ** random_.randrange(10))
        case 3 | 4:
            return "".join(chr(random_.choice([random_.randrange(128), 0x732B])) for _ in range(random_.randrange(9)))
        case 5 | 6:
            return [random_value(random_, depth - 1) for _ in range(random_.randrange(4))]
        case _:
            values = [random_value(random_, depth - 1) for _ in range(random_.randrange(4))]
            return {str(random_value(random_, 0)): value for value in values}


def places(table: FieldTable, value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Field]]:
    """Every field of the table, and of the tables inside of it as far as `value` has such objects."""
    for name, rule in table.items():
        yield (*path, name), rule
        inner = value.get(name)
        for step, each in enumerate(inner) if isinstance(inner, list) else [(None, inner)]:
            if isinstance(each, dict) and (inside := rule.fields_of(each)) is not None:
                yield from places(inside, each, (*path, name) if step is None else (*path, name, step))


def with_value(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(body)
    inner: Any = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return changed


def values_of(path: tuple[Any, ...]) -> list[Any]:
    random_ = random.Random(".".join(map(str, path)))
    return VALUES + [random_value(random_) for _ in range(20)]


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_refuses_what_it_cannot_be(route: str) -> None:
    kind, body = ROUTES[route]
    parse_request(kind, json.dumps(body).encode())
    for path, rule in places(kind.fields, body):
        name = ".".join(map(str, path))
        num_refused = 0
        for value in values_of(path):
            try:
                parse_request(kind, json.dumps(with_value(body, path, value)).encode())
            except BadRequest as error:
                num_refused += 1
                param = error.param or ""
                # A part whose type is wrong is refused as a whole, an item without one as a message; without a prompt,
                # messages are missing.
                whole = name.removesuffix(".type")
                others = (whole, f"{whole}.role", "messages" if route == "/tokenize" else name)
                assert param in (name, *others) or param.startswith(f"{name}."), (name, param, value)
                assert len(str(error)) < 500, (name, value)
        takes_anything = rule.rule is Rule.INFORMATIVE and not rule.kinds
        assert takes_anything or num_refused >= 15, (name, num_refused)


@pytest.mark.parametrize("route", ROUTES)
async def test_values_that_pass_do_no_harm_further_on(client: Client, worker: LocalWorker, route: str) -> None:
    kind, body = ROUTES[route][0], {"model": worker.served.name, **RUNNABLE[route]}
    headers = {"Content-Type": "application/json"}
    num_run = 0
    for name, rule in kind.fields.items():
        if name == "stream" or rule.rule is not Rule.HONOURED:
            continue
        for value in values_of((name,)):
            data = json.dumps({**body, name: value}).encode()
            try:
                parse_request(kind, data)
            except BadRequest:
                continue
            response = await client.post(route, data=data, headers=headers)
            answer = await response.json()
            assert response.status in (200, 400, 404), (name, value, answer)
            if response.status == 400 and answer["error"]["code"] == "invalid_request":
                assert answer["error"]["param"] == name, (name, value, answer)
            num_run += 1
    assert num_run > 10
    await worker.until_idle()


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"5", b"\xff", b"{", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"],
    ids=["empty", "list", "number", "no UTF-8", "open", "half a character", "deep", "digits"],
)
async def test_bodies_that_are_no_request(client: Client, data: bytes) -> None:
    for route in ROUTES:
        response = await client.post(route, data=data, headers={"Content-Type": "application/json"})
        assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_request")
