"""Answers that a request's schema, expression, choice or grammar constrains, over the real ports."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import jsonschema
import openai
import pytest

from tests.llm_worker.frontend.http_client import Client
from tests.llm_worker.frontend.serving import LocalWorker

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
NAMED = {"name": "paint", "schema": SCHEMA, "strict": True}
MESSAGES: list[Any] = [{"role": "user", "content": "Which colour?"}]
# The bias makes whitespace short: the model is random, and would fill its context with it.
SHORT = {"max_tokens": 250, "temperature": 1, "seed": 3, "logit_bias": {str(each): -100 for each in (9, 10, 13)}}


def body(worker: LocalWorker, **fields: Any) -> dict[str, Any]:
    return {"model": worker.served.name, "messages": MESSAGES, **SHORT, **fields}


async def answer(client: Client, worker: LocalWorker, **fields: Any) -> Any:
    response = await client.post("/v1/chat/completions", json=body(worker, **fields))
    return await response.json()


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
        {"guided_json": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"guided_json": json.dumps(SCHEMA), "response_format": {"type": "text"}, "structured_outputs": {}},
    ],
)
async def test_a_schema_by_any_of_its_names(client: Client, worker: LocalWorker, fields: dict[str, Any]) -> None:
    (choice,) = (await answer(client, worker, **fields))["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, "[a-c]{4}"),
        ({"guided_regex": "^[a-c]{4}$"}, "[a-c]{4}"),
        ({"regex": r"\d{3}"}, r"\d{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_choice": ["(a)", "b|c"]}, r"\(a\)|b\|c"),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-c]{2}/ ">"'}}, "<[a-c]{2}>"),
        ({"guided_grammar": 'root ::= "<" [a-c] ">"'}, "<[a-c]>"),
        ({"ebnf": 'root ::= "<" [a-c] ">"'}, "<[a-c]>"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*"),
    ],
)
async def test_other_forms(client: Client, worker: LocalWorker, fields: dict[str, Any], pattern: str) -> None:
    answered = await answer(client, worker, **fields)
    assert re.fullmatch(pattern, answered["choices"][0]["message"]["content"], re.DOTALL)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"items": {"not": {}}}}}},
            "response_format.json_schema.schema.items",
        ),
        ({"guided_json": {"$defs": {"a": {"uniqueItems": True}}, "$ref": "#/$defs/a"}}, "guided_json.$defs.a"),
        ({"guided_json": {"type": "string", "x-guidance": {"lenient": True}, "not": {}}}, "guided_json"),
        ({"guided_json": {"properties": {"a": {"pattern": "(?=b)"}}}}, "guided_json.properties.a"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
        ({"response_format": {"type": "json_object", "json_schema": NAMED}}, "response_format.json_schema"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_used_is_refused_where_it_stands(
    client: Client, worker: LocalWorker, fields: dict[str, Any], param: str, stream: bool
) -> None:
    response = await client.post("/v1/chat/completions", json=body(worker, stream=stream, **fields))
    error = (await response.json())["error"]
    assert (response.status, error["param"], error["code"]) == (400, param, "invalid_request")
    assert len(error["message"]) < 500


async def test_streams_of_several_answers(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    stream = await official.chat.completions.create(
        **body(worker, n=3, stream=True, response_format={"type": "json_schema", "json_schema": NAMED})
    )
    texts = ["", "", ""]
    reasons: dict[int, str | None] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


async def test_responses(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    format_: Any = {"type": "json_schema", **NAMED}
    response = await official.responses.create(
        model=worker.served.name,
        input="Which colour?",
        max_output_tokens=250,
        text={"format": format_},
        extra_body={"logit_bias": SHORT["logit_bias"]},
    )
    jsonschema.validate(json.loads(response.output_text), SCHEMA)
    assert response.text is not None and response.text.format is not None
    assert response.text.format.to_dict() == format_


async def test_a_stop_string_and_the_length_end_an_answer(client: Client, worker: LocalWorker) -> None:
    schema = {"response_format": {"type": "json_schema", "json_schema": NAMED}}
    stopped = (await answer(client, worker, stop=['"count"'], **schema))["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert re.fullmatch(r'\{\s*"colour"\s*:\s*"(red|green)"\s*,\s*', stopped["message"]["content"])
    cut = (await answer(client, worker, **{**schema, "max_tokens": 5}))["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"].startswith("{")
    ignoring = (await answer(client, worker, ignore_eos=True, guided_choice=["seven"]))["choices"][0]
    assert (ignoring["finish_reason"], ignoring["message"]["content"]) == ("stop", "seven")


HOSTILE: dict[str, dict[str, Any]] = {
    "a large automaton": {"guided_json": {"type": "integer", "multipleOf": 9999991}},
    "many intersections": {"guided_json": {"allOf": [{"pattern": f"a.{{{n}}}b"} for n in range(5, 30)]}},
    "exponential expression": {"guided_regex": "(a|b)*a(a|b){500}c"},
    "nested repetitions": {"guided_regex": "(((a|b|){1,1000}){1,1000}){1,1000}"},
    "products of alternatives": {
        "guided_json": {
            "allOf": [{"anyOf": [{"properties": {f"{i}": {"const": j}}} for j in range(5)]} for i in range(9)]
        }
    },
    "deep nesting": {"guided_json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "a million characters": {"guided_json": {"enum": ["x" * 1000 + str(index) for index in range(1000)]}},
    "ambiguous rules": {"guided_grammar": 'start: (((("a" | "b" | ""){0,50}){0,50}){0,50})'},
    "endless reference": {"guided_json": {"$ref": "#"}},
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_grammar_is_refused_or_bounded_and_holds_nothing_up(
    client: Client, worker: LocalWorker, kind: str
) -> None:
    hostile = asyncio.create_task(client.post("/v1/chat/completions", json=body(worker, **HOSTILE[kind], max_tokens=3)))
    longest_s = 0.0
    while not hostile.done():
        begin = time.perf_counter()
        assert (await client.get("/health")).status == 200
        longest_s = max(longest_s, time.perf_counter() - begin)
        await asyncio.sleep(0.02)
    response = await hostile
    assert response.status in (200, 400), await response.text()
    if response.status == 400:
        assert (await response.json())["error"]["param"].startswith("guided_")
    assert longest_s < 2
    fine = await answer(client, worker, guided_choice=["yes"])
    assert fine["choices"][0]["message"]["content"] == "yes"
    await worker.until_idle()
