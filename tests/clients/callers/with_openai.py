"""OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import openai
from shape import Shape


def connect(base_url: str) -> Any:
    return openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0)


def messages(question: str, pictures: Iterable[str] = ()) -> list[Any]:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def ask(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **options: Any) -> dict[str, Any]:
    options = {"temperature": 0, "max_tokens": 64, **options}
    answer = connect(base_url).chat.completions.create(model=model, messages=messages(question, pictures), **options)
    return {
        "text": answer.choices[0].message.content,
        "finish_reason": answer.choices[0].finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    pieces: list[str] = []
    finish_reason: Any = None
    usage: Any = None
    for chunk in connect(base_url).chat.completions.create(
        model=model,
        messages=messages(question, pictures),
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish_reason = choice.finish_reason or finish_reason
        usage = chunk.usage or usage
    return {
        "pieces": [each for each in pieces if each],
        "finish_reason": finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def accumulate(base_url: str, model: str, question: str) -> Any:
    """By the client's own helper, which puts the chunks of a stream together and checks them."""
    with connect(base_url).chat.completions.stream(
        model=model, messages=messages(question), temperature=0, max_tokens=64
    ) as events:
        return events.get_final_completion().choices[0].message.content


def several(base_url: str, model: str, question: str, n: int) -> list[str | None]:
    answer = connect(base_url).chat.completions.create(
        model=model, messages=messages(question), n=n, temperature=1.5, seed=1, max_tokens=16
    )
    return [choice.message.content for choice in answer.choices]


def logprobs(base_url: str, model: str, question: str) -> list[Any]:
    answer = connect(base_url).chat.completions.create(
        model=model, messages=messages(question), temperature=0, max_tokens=8, logprobs=True, top_logprobs=2
    )
    return [
        [each.token, each.logprob, [top.logprob for top in each.top_logprobs]]
        for each in answer.choices[0].logprobs.content
    ]


def _input(question: str, pictures: Iterable[str]) -> list[Any]:
    content = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in pictures]
    return [{"role": "user", "content": [*content, {"type": "input_text", "text": question}]}]


def respond(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    answer = connect(base_url).responses.create(
        model=model, input=_input(question, pictures), temperature=0, max_output_tokens=64
    )
    return {
        "text": answer.output_text,
        "prompt_tokens": answer.usage.input_tokens,
        "completion_tokens": answer.usage.output_tokens,
    }


def respond_stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    """By the client's own helper, which puts the events together and checks their order."""
    with connect(base_url).responses.stream(
        model=model, input=_input(question, pictures), temperature=0, max_output_tokens=64
    ) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        answer = events.get_final_response()
    assert answer.output_text == "".join(pieces)
    return {
        "pieces": pieces,
        "prompt_tokens": answer.usage.input_tokens,
        "completion_tokens": answer.usage.output_tokens,
    }


def models(base_url: str, model: str) -> list[Any]:
    client = connect(base_url)
    return [client.models.retrieve(each.id).id for each in client.models.list()]


def parse(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    answer = connect(base_url).chat.completions.parse(
        model=model, messages=messages(question, pictures), temperature=0, response_format=Shape
    )
    return answer.choices[0].message.parsed.model_dump()


def parse_stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    with connect(base_url).chat.completions.stream(
        model=model, messages=messages(question, pictures), temperature=0, response_format=Shape
    ) as events:
        return events.get_final_completion().choices[0].message.parsed.model_dump()


def parse_response(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    answer = connect(base_url).responses.parse(
        model=model, input=_input(question, pictures), temperature=0, text_format=Shape
    )
    return answer.output_parsed.model_dump()


def constrained(base_url: str, model: str, question: str, **extra_body: Any) -> Any:
    """With fields that OpenAI's API does not have."""
    answer = connect(base_url).chat.completions.create(
        model=model, messages=messages(question), temperature=0, max_tokens=64, extra_body=extra_body
    )
    return answer.choices[0].message.content


TOOLS: list[Any] = [openai.pydantic_function_tool(Shape, name="report", description="Reports a shape.")]
CHOICES: dict[str, Any] = {
    "named": {"type": "function", "function": {"name": "report"}},
    "required": "required",
    "auto": "auto",
    "none": "none",
}


def _calls(message: Any) -> list[dict[str, Any]]:
    return [
        {"name": each.function.name, "arguments": json.loads(each.function.arguments)}
        for each in message.tool_calls or ()
    ]


def call_tool(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    answer = connect(base_url).chat.completions.create(
        model=model,
        messages=messages(question),
        temperature=0,
        max_tokens=512,
        tools=TOOLS,
        tool_choice=CHOICES[choice],
    )
    message = answer.choices[0].message
    return {"calls": _calls(message), "text": message.content, "finish_reason": answer.choices[0].finish_reason}


def call_tool_stream(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    """By the client's own helper, which puts the deltas together and parses the arguments."""
    with connect(base_url).chat.completions.stream(
        model=model,
        messages=messages(question),
        temperature=0,
        max_tokens=512,
        tools=TOOLS,
        tool_choice=CHOICES[choice],
    ) as events:
        answer = events.get_final_completion().choices[0]
    for each in answer.message.tool_calls or ():
        assert isinstance(each.function.parsed_arguments, Shape)
    return {"calls": _calls(answer.message), "text": answer.message.content, "finish_reason": answer.finish_reason}


def call_tool_response(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    tools = [{"type": "function", "name": "report", "parameters": Shape.model_json_schema(), "strict": True}]
    of_responses = {"type": "function", "name": "report"} if choice == "named" else choice
    answer = connect(base_url).responses.create(
        model=model,
        input=_input(question, ()),
        temperature=0,
        max_output_tokens=512,
        tools=tools,
        tool_choice=of_responses,
    )
    calls = [each for each in answer.output if each.type == "function_call"]
    return {
        "calls": [{"name": each.name, "arguments": json.loads(each.arguments)} for each in calls],
        "text": answer.output_text or None,
    }


def answer_behind_tool(base_url: str, model: str, question: str) -> Any:
    """Calls the tool, and asks again with its result."""
    client = connect(base_url)
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 512, "tools": TOOLS}
    history = messages(question)
    called = client.chat.completions.create(**asked, messages=history, tool_choice="required").choices[0].message
    results = [{"role": "tool", "tool_call_id": each.id, "content": "done"} for each in called.tool_calls]
    answer = client.chat.completions.create(**asked, messages=[*history, called, *results], tool_choice="none")
    return {
        "text": answer.choices[0].message.content,
        "calls": _calls(called),
        "ids": [each.id for each in called.tool_calls],
    }
