"""The Responses API, by the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.llm_worker.frontend.openai_prompt import template_messages
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.prompt.chat_template import Chat

FILE = {"type": "input_image", "file_id": "f"}
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


async def chat(official: openai.AsyncOpenAI, worker: LocalWorker, messages: list[Any]) -> Any:
    answer = await official.chat.completions.create(
        model=worker.served.name, messages=messages, temperature=0, max_tokens=16
    )
    return answer.choices[0].message.content


async def test_it_answers_as_a_chat_does(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    expected = await chat(
        official, worker, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    )
    response = await official.responses.create(
        model=worker.served.name,
        instructions="Be brief.",
        input="Hello",
        temperature=0,
        max_output_tokens=16,
        metadata={"run": "7"},
    )
    assert response.output_text == expected
    assert (response.status, response.instructions, response.metadata) == ("incomplete", "Be brief.", {"run": "7"})
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
    assert (response.temperature, response.top_p, response.object) == (0, worker.served.defaults.top_p, "response")
    usage = response.usage
    assert usage is not None and usage.output_tokens == 16 and usage.total_tokens == usage.input_tokens + 16
    assert response.model_extra is not None and response.model_extra["timings"]["ttft_ms"] > 0


async def test_a_conversation_goes_on_from_what_was_answered(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    asked: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    first = await official.responses.create(
        model=worker.served.name, input=asked, temperature=0, max_output_tokens=16, store=False
    )
    more = [*asked, *(each.to_dict() for each in first.output), {"role": "user", "content": "And?"}]
    second = await official.responses.create(model=worker.served.name, input=more, temperature=0, max_output_tokens=16)
    repeated = [*asked, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And?"}]
    assert second.output_text == await chat(official, worker, repeated)


@pytest.mark.parametrize("stop", [False, True])
async def test_events_come_in_order_and_add_up(official: openai.AsyncOpenAI, worker: LocalWorker, stop: bool) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "input": "Hello", "temperature": 0, "max_output_tokens": 16}
    if stop:
        whole = await official.responses.create(**asked)
        asked["extra_body"] = {"stop": whole.output_text[4:6]}
    whole = await official.responses.create(**asked)
    events = [event async for event in await official.responses.create(**asked, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [*EVENTS, "response.completed" if stop else "response.incomplete"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None and whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens


async def test_logprobs_are_included_where_asked_for(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    response = await official.responses.create(
        model=worker.served.name,
        input="Hello",
        temperature=0,
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    part: Any = response.output[0].to_dict()["content"][0]  # type: ignore[index]
    assert "".join(each["token"] for each in part["logprobs"]) == response.output_text
    assert [len(each["top_logprobs"]) for each in part["logprobs"]] == [2] * 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": 5}}]}, "tools.0.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input.0"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "input.0.arguments"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input.0.content.0.image_url",
        ),
        *(
            (
                {
                    "instructions": "Be brief.",
                    "input": [
                        {"role": "system", "content": "Go."},
                        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                        {
                            "type": "function_call_output",
                            "call_id": "1",
                            "output": [{"type": "input_text", "text": ""}],
                        },
                        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", **image}]},
                    ],
                },
                f"input.3.output.0.{field}",
            )
            for image, field in (
                ({"image_url": "data:image/png;base64,@"}, "image_url"),
                ({"image_url": "data:,", "min_pixels": 2, "max_pixels": 1}, "max_pixels"),
            )
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
    ],
)
async def test_what_is_refused(
    official: openai.AsyncOpenAI, worker: LocalWorker, fields: dict[str, Any], param: str
) -> None:
    body = {"model": worker.served.name, "input": "Hello", **fields}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await official.post("/responses", body={**body, "stream": stream}, cast_to=object)
        assert caught.value.param == param


def test_instructions_and_a_system_message_are_one(worker: LocalWorker) -> None:
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    contents: list[Any] = ["Second.", [{"type": "input_text", "text": "Second."}]]
    texts = {
        tokenizer.render_chat(
            Chat(
                template_messages(
                    ResponsesRequest.model_validate(
                        {
                            "model": "m",
                            "instructions": "First.",
                            "input": [{"role": "system", "content": content}, {"role": "user", "content": "Hello"}],
                        }
                    ).messages
                )
            )
        ).text
        for content in contents
    }
    [text] = texts
    assert "system\nFirst.\n\nSecond.<|im_end|>" in text and text.count("system") == 1


async def test_an_error_after_the_first_token_is_an_event(
    official: openai.AsyncOpenAI, worker: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = worker.generator.generate

    async def fails(*arguments: Any) -> AsyncIterator[Any]:
        num_events = 0
        async for event in generate(*arguments):
            yield event
            num_events += 1
            if num_events == 3:
                raise EncoderUnavailable("the encoder was lost")

    monkeypatch.setattr(worker.generator, "generate", fails)
    stream = await official.responses.create(model=worker.served.name, input="Hello", stream=True)
    events = [event async for event in stream]
    last = events[-1]
    assert last.type == "error"
    assert (last.code, last.sequence_number) == ("encoder_unavailable", len(events) - 1)
