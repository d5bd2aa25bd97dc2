"""Tools over HTTP, by the official client: calls in answers, whole and streamed, and their way back into the prompt."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.llm_worker.frontend.http_client import Client, client_of
from tests.llm_worker.frontend.scripted_generator import scripted
from tests.llm_worker.frontend.serving import LocalWorker, serving
from tests.llm_worker.prompt.answer_tokens import with_answer_tokens

CHAT = "/v1/chat/completions"
FUNCTION: dict[str, Any] = {
    "name": "crop",
    "description": "Cuts out a part.",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS: list[Any] = [{"type": "function", **FUNCTION}]
ARGUMENTS = ['{"x": 1}', '{ "x" :2, "to": "猫 </tool_call> <b>" }']
CALLS = [f'<tool_call>\n{{"name": "crop", "arguments": {arguments}}}\n</tool_call>' for arguments in ARGUMENTS]
SCRIPT = f"Let me see <it>.\n{CALLS[0]}\n{CALLS[1]}"
USER: list[Any] = [{"role": "user", "content": "Cut it."}]


@pytest.fixture(params=["text", "tokens"])
async def worker(request: pytest.FixtureRequest, qwen3_vl_folder: Path, tmp_path: Path) -> AsyncIterator[LocalWorker]:
    """The tags of a call are text to one tokenizer, and tokens to the other, as to Qwen's."""
    folder = qwen3_vl_folder if request.param == "text" else with_answer_tokens(qwen3_vl_folder, tmp_path / "model")
    async with serving(folder) as worker:
        yield worker


@asynccontextmanager
async def answering(worker: LocalWorker, *scripts: str) -> AsyncIterator[tuple[openai.AsyncOpenAI, dict[str, Any]]]:
    """A client of a worker that answers so, and the beginning of a request."""
    async with (
        client_of(scripted(worker.served, *scripts)) as client,
        openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="unused", max_retries=0) as official,
    ):
        yield official, {"model": worker.served.name}
    await worker.until_idle()


def called(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


async def test_calls_are_parsed(worker: LocalWorker) -> None:
    async with answering(worker, SCRIPT, CALLS[1], "Nothing to cut.") as (official, asked):
        answer = await official.chat.completions.create(**asked, messages=USER, tools=TOOLS, n=3)
    both, one, none = answer.choices
    assert (both.finish_reason, both.message.content) == ("tool_calls", "Let me see <it>.")
    assert called(both.message) == [("crop", arguments) for arguments in ARGUMENTS]
    assert (one.finish_reason, one.message.content) == ("tool_calls", None)
    assert called(one.message) == [("crop", ARGUMENTS[1])]
    assert (none.finish_reason, none.message.content, none.message.tool_calls) == ("stop", "Nothing to cut.", None)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == 3 and all(each.startswith("call_") for each in ids)


async def test_calls_are_streamed(worker: LocalWorker) -> None:
    async with answering(worker, SCRIPT, CALLS[1], "Nothing to cut.") as (official, asked):
        stream = await official.chat.completions.create(
            **asked, messages=USER, tools=TOOLS, n=3, stream=True, logprobs=True, extra_body={"return_token_ids": True}
        )
        chunks = [chunk.choices[0] async for chunk in stream]
    for index, (content, arguments) in enumerate(
        [("Let me see <it>.", ARGUMENTS), ("", ARGUMENTS[1:]), ("Nothing to cut.", [])]
    ):
        own = [each for each in chunks if each.index == index]
        assert "".join(each.delta.content or "" for each in own) == content
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + ["tool_calls" if arguments else "stop"]
        deltas = [call for each in own for call in each.delta.tool_calls or []]
        for number, text in enumerate(arguments):
            first, *rest = [each for each in deltas if each.index == number]
            assert first.id and first.type == "function" and first.function.name == "crop"
            assert first.function.arguments == "" and len(rest) > 5
            assert [(each.id, each.type, each.function.name) for each in rest] == [(None, None, None)] * len(rest)
            assert "".join(each.function.arguments for each in rest) == text
        assert len({each.index for each in deltas}) == len(arguments)
        script = (SCRIPT, CALLS[1], "Nothing to cut.")[index]
        assert worker.generator.tokenizer is not None
        ids = worker.generator.tokenizer.encode(script)
        assert [token for each in own for token in (each.model_extra or {}).get("token_ids", [])] == ids
        assert sum(len(each.logprobs.content) for each in own if each.logprobs) == len(ids)


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        ('<tool_call>\n{"name": "paint", "arguments": {}}\n</tool_call>', {}),
        ("<tool_call> is a tag, <tool", {}),
        (CALLS[0], {"tool_choice": "none"}),
        (CALLS[0], {"tools": []}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_no_call_is_content(
    worker: LocalWorker, script: str, fields: dict[str, Any], stream: bool
) -> None:
    async with answering(worker, script) as (official, asked):
        answer: Any = await official.chat.completions.create(
            **(asked | {"messages": USER, "tools": TOOLS, "stream": stream} | fields)
        )
        choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    content = "".join(each.delta.content or "" for each in choices) if stream else choices[0].message.content
    assert (content, choices[-1].finish_reason) == (script, "stop")


async def test_a_call_that_is_cut_is_content_or_has_been_streamed(worker: LocalWorker) -> None:
    async with answering(worker, CALLS[0]) as (official, asked):
        assert worker.generator.tokenizer is not None
        num_tokens = len(worker.generator.tokenizer.encode(CALLS[0][: CALLS[0].index("1")]))
        asked |= {"messages": USER, "tools": TOOLS, "max_tokens": num_tokens}
        whole = (await official.chat.completions.create(**asked)).choices[0]
        assert (whole.finish_reason, whole.message.tool_calls) == ("length", None)
        assert whole.message.content == CALLS[0][: CALLS[0].index("1")]
        chunks = [chunk.choices[0] async for chunk in await official.chat.completions.create(**asked, stream=True)]
    arguments = [call.function.arguments for each in chunks for call in each.delta.tool_calls or []]
    assert ("".join(arguments), chunks[-1].finish_reason) == ('{"x": ', "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_older_form(worker: LocalWorker, stream: bool) -> None:
    async with answering(worker, SCRIPT) as (official, asked):
        asked |= {"messages": USER, "functions": [FUNCTION], "function_call": "auto", "stream": stream}
        answer: Any = await official.chat.completions.create(**asked)
        choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    calls = [each.delta.function_call if stream else each.message.function_call for each in choices]
    assert "".join(each.arguments or "" for each in calls if each) == ARGUMENTS[0]
    assert [each.name for each in calls if each and each.name] == ["crop"]
    assert choices[-1].finish_reason == "function_call"


async def test_responses_have_calls_as_items(worker: LocalWorker) -> None:
    async with answering(worker, SCRIPT) as (official, asked):
        asked |= {"input": "Cut it.", "tools": FLAT_TOOLS}
        whole = await official.responses.create(**asked)
        events = [event async for event in await official.responses.create(**asked, stream=True)]
        message, *calls = whole.output
        assert whole.output_text == "Let me see <it>." and message.type == "message"
        assert [(call.type, call.name, call.arguments, call.status) for call in calls] == [
            ("function_call", "crop", arguments, "completed") for arguments in ARGUMENTS
        ]
        assert whole.status == "completed" and whole.tools[0].to_dict()["name"] == "crop"
        # The stream says the same, and each item is made of its own events.
        streamed = events[-1].response.output
        assert [each.type for each in streamed] == [each.type for each in whole.output]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        for index, arguments in enumerate(ARGUMENTS, 1):
            own = [event for event in events if getattr(event, "output_index", None) == index]
            kinds = [event.type for event in own]
            assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"
            assert kinds[-2] == "response.function_call_arguments.done" and own[-2].arguments == arguments
            assert set(kinds[1:-2]) == {"response.function_call_arguments.delta"}
            assert "".join(event.delta for event in own[1:-2]) == arguments
            assert own[-1].item.call_id == streamed[index].call_id
        # And back again, with what the functions have returned.
        outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "ok"} for call in calls]
        given = [*USER, *(each.to_dict() for each in whole.output), *outputs]
        again = await official.responses.create(**(asked | {"input": given}))
    history = [
        *USER,
        {"role": "assistant", "content": "Let me see <it>.", "tool_calls": history_calls()},
        *({"role": "tool", "content": "ok", "tool_call_id": f"{index}"} for index in range(2)),
    ]
    async with client_of(worker.served) as client:
        tokens = await tokenized(client, messages=history, tools=TOOLS)
    assert again.usage is not None and again.usage.input_tokens == len(tokens)


def history_calls(as_text: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{index}",
            "type": "function",
            "function": {"name": "crop", "arguments": arguments if as_text else json.loads(arguments)},
        }
        for index, arguments in enumerate(ARGUMENTS)
    ]


async def tokenized(client: Client, **fields: Any) -> list[int]:
    answer = await (await client.post("/tokenize", json=fields)).json()
    tokens: list[int] = answer["tokens"]
    return tokens


@pytest.mark.parametrize("as_text", [False, True])
async def test_history_and_tools_reach_the_template(worker: LocalWorker, as_text: bool) -> None:
    """As transformers renders them; their text is text to both tokenizers here."""
    hf = AutoTokenizer.from_pretrained(worker.served.root)
    messages = [
        *USER,
        {"role": "assistant", "content": "Yes.", "tool_calls": history_calls(as_text=False)[:1]},
        {"role": "tool", "content": "done", "tool_call_id": "0", "name": "crop"},
    ]
    rendered = hf.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert '<tool_call>\n{"name": "crop", "arguments": {"x": 1}}\n</tool_call>' in rendered
    sent = json.loads(json.dumps(messages))
    sent[1]["tool_calls"] = history_calls(as_text)[:1]
    async with client_of(worker.served) as client:
        assert await tokenized(client, messages=sent, tools=TOOLS) == hf.backend_tokenizer.encode(rendered).ids
        without = await tokenized(client, messages=sent, tools=TOOLS, tool_choice="none")
        assert without == await tokenized(client, messages=sent)
        older = [
            sent[0],
            {"role": "assistant", "content": "Yes.", "function_call": sent[1]["tool_calls"][0]["function"]},
            {"role": "function", "name": "crop", "content": "done"},
        ]
        assert await tokenized(client, messages=older, tools=TOOLS) == await tokenized(
            client, messages=sent, tools=TOOLS
        )


def nested(depth: int) -> dict[str, Any]:
    """A schema of schemas in each other, as deep as a body may be."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return {"type": "object", "properties": {"a": schema}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": TOOLS * 2}, "tools.1.function.name"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"x": {"type": "int"}}}},
                    }
                ]
            },
            "tools.0.function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "paint"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "functions": [FUNCTION]}, "functions"),
        ({"tools": TOOLS, "function_call": {"name": "crop"}}, "function_call"),
        ({"functions": [FUNCTION], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [FUNCTION], "tool_choice": "none"}, "tool_choice"),
        ({"functions": [FUNCTION], "function_call": {"name": "paint"}}, "function_call"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        *(
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]},
                "messages.0.tool_calls.0.function.arguments",
            )
            for text in ('{"a":' * 5000 + "1" + "}" * 5000, "[" * 100_000, r'{"a": "\ud800"}')
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(150)}}]},
            "tools.0.function.parameters",
        ),
        ({"messages": [{"role": "user", "content": "", "tool_calls": history_calls()}]}, "messages.0"),
        (
            {"messages": [{"role": "assistant", "tool_calls": history_calls(), "function_call": {"name": "crop"}}]},
            "messages.0",
        ),
    ],
)
async def test_what_is_refused(client: Client, worker: LocalWorker, fields: dict[str, Any], param: str) -> None:
    response = await client.post(CHAT, json={"model": worker.served.name, "messages": USER, **fields})
    assert (response.status, (await response.json())["error"]["param"]) == (400, param)


async def test_a_template_without_tools_refuses_them(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    folder = with_answer_tokens(qwen3_vl_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    async with serving(folder) as worker, client_of(worker.served) as client:
        asked = {"model": worker.served.name, "messages": USER}
        history = [*USER, {"role": "assistant", "tool_calls": history_calls()}]
        for fields, param in (({"tools": TOOLS}, "tools"), ({"messages": history}, "messages")):
            response = await client.post(CHAT, json=asked | fields)
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, param)
            assert "chat template writes no" in error["message"]
        assert (await client.post(CHAT, json=asked | {"tools": TOOLS, "tool_choice": "none"})).status == 200
