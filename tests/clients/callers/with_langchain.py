"""LangChain's ChatOpenAI."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from shape import Shape


def connect(base_url: str, model: str, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 64, **options}
    return ChatOpenAI(base_url=base_url, api_key="unused", max_retries=0, model=model, **options)


def message(question: str, pictures: Iterable[str] = ()) -> HumanMessage:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return HumanMessage(content=[*content, {"type": "text", "text": question}])


def ask(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **options: Any) -> dict[str, Any]:
    answer = connect(base_url, model, **options).invoke([message(question, pictures)])
    return {
        "text": answer.text,
        "finish_reason": answer.response_metadata.get("finish_reason"),
        "prompt_tokens": answer.usage_metadata["input_tokens"],
        "completion_tokens": answer.usage_metadata["output_tokens"],
    }


def stream(base_url: str, model: str, question: str, pictures: Iterable[str] = (), **options: Any) -> dict[str, Any]:
    chunks = list(connect(base_url, model, stream_usage=True, **options).stream([message(question, pictures)]))
    answer = chunks[0]
    for chunk in chunks[1:]:
        answer += chunk
    return {
        "pieces": [chunk.text for chunk in chunks if chunk.text],
        "finish_reason": answer.response_metadata.get("finish_reason"),
        "prompt_tokens": answer.usage_metadata["input_tokens"],
        "completion_tokens": answer.usage_metadata["output_tokens"],
    }


def several(base_url: str, model: str, question: str, n: int) -> list[str]:
    client = connect(base_url, model, n=n, temperature=1.5, seed=1, max_tokens=16)
    return [each.text for each in client.generate([[message(question)]]).generations[0]]


def logprobs(base_url: str, model: str, question: str) -> list[Any]:
    client = connect(base_url, model, max_tokens=8, logprobs=True, top_logprobs=2)
    answer = client.invoke([message(question)])
    return [
        [each["token"], each["logprob"], [top["logprob"] for top in each["top_logprobs"]]]
        for each in answer.response_metadata["logprobs"]["content"]
    ]


def respond(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    return ask(base_url, model, question, pictures, use_responses_api=True)


def respond_stream(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> dict[str, Any]:
    return stream(base_url, model, question, pictures, use_responses_api=True)


def parse(base_url: str, model: str, question: str, pictures: Iterable[str] = (), method: str = "json_schema") -> Any:
    client = connect(base_url, model, max_tokens=512).with_structured_output(Shape, method=method)
    return client.invoke([message(question, pictures)]).model_dump()


def parse_tool(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return parse(base_url, model, question, pictures, method="function_calling")


CHOICES = {"named": "report", "required": "any", "auto": "auto", "none": "none"}


def _report(kind: str, color: str, is_filled: bool) -> str:
    """Reports a shape."""
    return "done"


report: Any = tool("report", args_schema=Shape)(_report)


def _with_tool(base_url: str, model: str, choice: str) -> Any:
    return connect(base_url, model, max_tokens=512).bind_tools([report], tool_choice=CHOICES[choice], strict=True)


def _called(answer: Any) -> dict[str, Any]:
    return {
        "calls": [{"name": each["name"], "arguments": each["args"]} for each in answer.tool_calls],
        "text": answer.text or None,
        "finish_reason": answer.response_metadata["finish_reason"],
    }


def call_tool(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    return _called(_with_tool(base_url, model, choice).invoke([message(question)]))


def call_tool_stream(base_url: str, model: str, question: str, choice: str) -> dict[str, Any]:
    first, *others = _with_tool(base_url, model, choice).stream([message(question)])
    return _called(sum(others, start=first))


def answer_behind_tool(base_url: str, model: str, question: str) -> Any:
    history = [message(question)]
    called = _with_tool(base_url, model, "required").invoke(history)
    results = [report.invoke(each) for each in called.tool_calls]
    answer = _with_tool(base_url, model, "none").invoke([*history, called, *results])
    return {**_called(called), "text": answer.text, "ids": [each["id"] for each in called.tool_calls]}
