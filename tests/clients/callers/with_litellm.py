"""LiteLLM, as a client of any server that speaks OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it is downloaded otherwise

import litellm
from shape import Shape


def _complete(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **options: Any) -> Any:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    options = {"temperature": 0, "max_tokens": 64, "max_retries": 0, **options}
    provider = options.pop("provider", "openai")
    return litellm.completion(
        model=f"{provider}/{model}", api_base=base_url, api_key="unused", messages=messages, **options
    )


def ask(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **options: Any) -> dict[str, Any]:
    answer = _complete(base_url, model, question, pictures, **options)
    return {
        "text": answer.choices[0].message.content,
        "finish_reason": answer.choices[0].finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(_complete(base_url, model, question, pictures, **streamed))
    answer = litellm.stream_chunk_builder(chunks)
    return {
        "pieces": [each for chunk in chunks if chunk.choices and (each := chunk.choices[0].delta.content)],
        "finish_reason": answer.choices[0].finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
    }


def several(base_url: str, model: str, question: str, n: int) -> list[Any]:
    answer = _complete(base_url, model, question, n=n, temperature=1.5, seed=1, max_tokens=16)
    return [choice.message.content for choice in answer.choices]


def logprobs(base_url: str, model: str, question: str) -> list[Any]:
    answer = _complete(base_url, model, question, max_tokens=8, logprobs=True, top_logprobs=2)
    return [
        [each.token, each.logprob, [top.logprob for top in each.top_logprobs]]
        for each in answer.choices[0].logprobs.content
    ]


def _respond(base_url: str, model: str, question: str, pictures: Iterable[str], **options: Any) -> Any:
    content = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in pictures]
    return litellm.responses(
        model=f"openai/{model}",
        api_base=base_url,
        api_key="unused",
        input=[{"role": "user", "content": [*content, {"type": "input_text", "text": question}]}],
        temperature=0,
        max_output_tokens=64,
        **options,
    )


def respond(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    answer = _respond(base_url, model, question, pictures)
    return {
        "text": answer.output_text,
        "prompt_tokens": answer.usage.input_tokens,
        "completion_tokens": answer.usage.output_tokens,
    }


def respond_stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    pieces: list[str] = []
    answer: Any = None
    for event in _respond(base_url, model, question, pictures, stream=True):
        if event.type == "response.output_text.delta":
            pieces.append(event.delta)
        elif event.type == "response.completed":
            answer = event.response
    return {
        "pieces": pieces,
        "prompt_tokens": answer.usage.input_tokens,
        "completion_tokens": answer.usage.output_tokens,
    }


def parse(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    answer = _complete(base_url, model, question, pictures, response_format=Shape, max_tokens=512)
    return Shape.model_validate_json(answer.choices[0].message.content).model_dump()


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "report",
            "description": "Reports a shape.",
            "parameters": Shape.model_json_schema(),
            "strict": True,
        },
    }
]
CHOICES: dict[str, Any] = {
    "named": {"type": "function", "function": {"name": "report"}},
    "required": "required",
    "auto": "auto",
    "none": "none",
}


def _called(choice: Any) -> dict[str, Any]:
    return {
        "calls": [
            {"name": each.function.name, "arguments": json.loads(each.function.arguments)}
            for each in choice.message.tool_calls or ()
        ],
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
    }


def call_tool(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    asked = {"tools": TOOLS, "tool_choice": CHOICES[choice], "max_tokens": 512}
    return _called(_complete(base_url, model, question, **asked).choices[0])


def call_tool_stream(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    asked = {"tools": TOOLS, "tool_choice": CHOICES[choice], "max_tokens": 512, "stream": True}
    answer = litellm.stream_chunk_builder(list(_complete(base_url, model, question, **asked)))
    return _called(answer.choices[0])
