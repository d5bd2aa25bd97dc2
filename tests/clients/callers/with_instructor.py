"""Instructor, which has OpenAI's client answer with objects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import instructor
import openai
from shape import Shape


def _parse(mode: str, base_url: str, model: str, question: str, pictures: Iterable[str]) -> Any:
    client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0)
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    answer = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        response_model=Shape,
        temperature=0,
        max_retries=0,
    )
    return answer.model_dump()


def parse(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse("JSON_SCHEMA", base_url, model, question, pictures)


def parse_tool(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse("TOOLS", base_url, model, question, pictures)


def parse_strict_tool(base_url: str, model: str, question: str, pictures: Iterable[str] = ()) -> Any:
    return _parse("TOOLS_STRICT", base_url, model, question, pictures)
