"""Pydantic AI's agents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from shape import Shape


def agent(base_url: str, model: str, kind: Any = OpenAIChatModel, settings: Any = None, **options: Any) -> Any:
    provider = OpenAIProvider(base_url=base_url, api_key="unused")
    settings = {"temperature": 0, "max_tokens": 64, **(settings or {})}
    return Agent(kind(model, provider=provider), model_settings=settings, **options)


def prompt(question: str, pictures: Iterable[str] = ()) -> list[Any]:
    return [*map(BinaryContent.from_data_uri, pictures), question]


def ask(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **settings: Any) -> dict[str, Any]:
    kind = settings.pop("kind", OpenAIChatModel)
    result = agent(base_url, model, kind, settings).run_sync(prompt(question, pictures))
    return {
        "text": result.output,
        "finish_reason": result.response.finish_reason,
        "prompt_tokens": result.usage.input_tokens,
        "completion_tokens": result.usage.output_tokens,
    }


def stream(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **settings: Any) -> dict[str, Any]:
    kind = settings.pop("kind", OpenAIChatModel)

    async def run() -> dict[str, Any]:
        async with agent(base_url, model, kind, settings).run_stream(prompt(question, pictures)) as result:
            pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
        return {
            "pieces": pieces,
            "finish_reason": result.response.finish_reason,
            "prompt_tokens": result.usage.input_tokens,
            "completion_tokens": result.usage.output_tokens,
        }

    return asyncio.run(run())


def logprobs(base_url: str, model: str, question: str) -> list[Any]:
    settings = {"openai_logprobs": True, "openai_top_logprobs": 2, "max_tokens": 8}
    result = agent(base_url, model, settings=settings).run_sync(prompt(question))
    return [
        [each["token"], each["logprob"], [top["logprob"] for top in each["top_logprobs"]]]
        for each in result.response.provider_details["logprobs"]
    ]


def respond(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    return ask(base_url, model, question, pictures, kind=OpenAIResponsesModel)


def respond_stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    return stream(base_url, model, question, pictures, kind=OpenAIResponsesModel)


def _parse(output: Any, base_url: str, model: str, question: str, pictures: Iterable[str], kind: Any) -> Any:
    asked = agent(base_url, model, kind, {"max_tokens": 512}, output_type=output, retries=0)
    return asked.run_sync(prompt(question, pictures)).output.model_dump()


def parse(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse(NativeOutput(Shape), base_url, model, question, pictures, OpenAIChatModel)


def parse_tool(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse(ToolOutput(Shape), base_url, model, question, pictures, OpenAIChatModel)


def parse_response(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse(NativeOutput(Shape), base_url, model, question, pictures, OpenAIResponsesModel)


def parse_response_tool(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse(ToolOutput(Shape), base_url, model, question, pictures, OpenAIResponsesModel)
