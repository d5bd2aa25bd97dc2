"""Calls that the answer must make, by the real engine: even a random model calls a tool then, as its schema says."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from tests.llm_worker.frontend.http_client import Client
from tests.llm_worker.frontend.serving import LocalWorker

SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "side": {"enum": ["left", "right"]}},
    "required": ["on", "side"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "turn", "parameters": SCHEMA}
OTHER: dict[str, Any] = {"name": "stay", "parameters": {"type": "object", "additionalProperties": False}}
TOOLS: list[Any] = [{"type": "function", "function": each} for each in (FUNCTION, OTHER)]
SCHEMAS = {"turn": SCHEMA, "stay": OTHER["parameters"]}
NAMED = {"type": "function", "function": {"name": "turn"}}


def asked(worker: LocalWorker, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Go."}]
    body = {"model": worker.served.name, "messages": messages, "tools": TOOLS, "max_tokens": 200, "temperature": 1}
    return {**body, "parallel_tool_calls": False, "seed": 1, **fields}


def check(name: str, arguments: str) -> None:
    Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))
    assert not set(arguments) & set("\n\r\t") and "  " not in arguments


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_one_call(official: openai.AsyncOpenAI, worker: LocalWorker, choice: Any) -> None:
    answer = await official.chat.completions.create(**asked(worker, tool_choice=choice, n=4))
    for each in answer.choices:
        assert (each.finish_reason, each.message.content) == ("tool_calls", None)
        [call] = each.message.tool_calls or []
        assert call.type == "function" and (choice == "required" or call.function.name == "turn")
        check(call.function.name, call.function.arguments)
    stream: Any = await official.chat.completions.create(**asked(worker, tool_choice=choice, stream=True))
    chunks = [chunk.choices[0] async for chunk in stream]
    deltas = [call.function for each in chunks for call in each.delta.tool_calls or []]
    assert answer.choices[0].message.tool_calls is not None
    whole: Any = answer.choices[0].message.tool_calls[0]
    assert deltas[0].name == whole.function.name and chunks[-1].finish_reason == "tool_calls"
    assert "".join(each.arguments for each in deltas) == whole.function.arguments
    assert not any(each.delta.content for each in chunks)


async def test_several_calls(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    """A random model goes on until it is cut; what it has called until then is whole."""
    fields = asked(worker, tool_choice="required", parallel_tool_calls=True)
    answer = (await official.chat.completions.create(**fields)).choices[0]
    calls = answer.message.tool_calls or []
    assert len(calls) >= 1 and len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function"
        check(call.function.name, call.function.arguments)


async def test_a_call_in_a_response(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    fields: dict[str, Any] = {
        "model": worker.served.name,
        "input": "Go.",
        "tools": [{"type": "function", "strict": True, **FUNCTION}],
        "tool_choice": {"type": "function", "name": "turn"},
        "max_output_tokens": 200,
    }
    response: Any = await official.responses.create(**fields)
    [call] = response.output
    assert (response.status, call.type, call.name, response.tool_choice.name) == (
        "completed",
        "function_call",
        "turn",
        "turn",
    )
    check(call.name, call.arguments)


async def test_the_older_form(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    fields = asked(worker, functions=[FUNCTION], function_call={"name": "turn"})
    del fields["tools"], fields["parallel_tool_calls"]
    answer = (await official.chat.completions.create(**fields)).choices[0]
    assert answer.finish_reason == "function_call" and answer.message.function_call is not None
    check("turn", answer.message.function_call.arguments)


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "object", "properties": {"a": {"not": {"required": ["x"]}}}}, ".properties.a"),
        ({"anyOf": [{"type": "string"}]}, ""),  # which is no schema of an object
    ],
)
async def test_a_schema_that_cannot_be_used_is_named(
    client: Client, worker: LocalWorker, schema: dict[str, Any], where: str
) -> None:
    bad = {"name": "f", "parameters": schema}
    tool, flat_tool = {"type": "function", "function": bad}, {"type": "function", **bad}
    # Among those that may be called it is the only one.
    named = {"tool_choice": {"type": "function", "function": {"name": "f"}}}
    chat, required = asked(worker, tools=[*TOOLS, tool]), {"tool_choice": "required"}
    older = {"functions": [OTHER, bad], "function_call": {"name": "f"}}
    response = {"model": worker.served.name, "input": "Go.", "tools": [flat_tool], **required}
    for route, body, param in (
        ("chat/completions", chat | required, "tools.2.function.parameters"),
        ("chat/completions", chat | named, "tools.2.function.parameters"),
        ("chat/completions", chat | older | {"tools": []}, "functions.1.parameters"),
        ("responses", response, "tools.0.parameters"),
    ):
        answer = await client.post(f"/v1/{route}", json=body)
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, param + where)
    assert (await client.post("/v1/chat/completions", json=chat | {"tool_choice": "none"})).status == 200


async def test_all_tools_together_can_be_too_much(client: Client, worker: LocalWorker) -> None:
    schema = {"type": "object", "description": "x" * 100_000}
    tools = [{"type": "function", "function": {"name": f"f{index}", "parameters": schema}} for index in range(3)]
    body = asked(worker, tools=tools, tool_choice="required")
    answer = await client.post("/v1/chat/completions", json=body)
    assert (answer.status, (await answer.json())["error"]["param"]) == (400, "tools")
