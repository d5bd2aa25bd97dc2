"""Two ways to answer the questions: transformers in one process, and the split over OpenAI HTTP."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.accuracy.questions import AskedQuestion
from vitrine_vlm.deploy.launcher.ask import AskFailed, served_model
from vitrine_vlm.deploy.launcher.stack import Stack
from vitrine_vlm.sample_models.reference import Media, Reference

_MAX_TOKENS = 48
_IN_FLIGHT = 8
_MIME_TYPES = {"image": "image/png", "video": "video/mp4"}


def answers_of_transformers(folder: Path, questions: Sequence[AskedQuestion]) -> list[str]:
    """Returns greedy answers of transformers' own model and processor, in float32, one question at a time."""
    reference = Reference(folder)
    return [reference.answer(question.text, list(question.media), _MAX_TOKENS) for question in questions]


async def answers_of_split(
    folder: Path,
    questions: Sequence[AskedQuestion],
    num_encoders: int = 1,
    dp: int = 1,
    encoder_flags: Sequence[str] = (),
    worker_flags: Sequence[str] = (),
    rounds: int = 1,
) -> list[str]:
    """Returns greedy answers of real services, with several questions in flight.

    Args:
        rounds: how often all questions are sent; the last answers are returned.

    Raises:
        AskFailed: the worker refused a question.
        ChildFailed: a service ended.
    """
    running = Stack.running(
        folder, num_encoders=num_encoders, dp=dp, encoder_flags=encoder_flags, worker_flags=worker_flags
    )
    async with running as stack:
        await stack.wait_ready()
        for _ in range(rounds):
            answers = await stack.unless_failed(_ask_all(stack.base_url, questions))
        return answers


async def _ask_all(base_url: str, questions: Sequence[AskedQuestion]) -> list[str]:
    model = await served_model(base_url)
    in_flight = asyncio.Semaphore(_IN_FLIGHT)

    async def ask(session: aiohttp.ClientSession, question: AskedQuestion) -> str:
        body = chat_body(model, question)
        async with in_flight, session.post(f"{base_url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise AskFailed(f"HTTP {response.status}: {await response.text()}")
            return str((await response.json())["choices"][0]["message"]["content"])

    async with aiohttp.ClientSession() as session:
        return await asyncio.gather(*(ask(session, question) for question in questions))


def chat_body(model: str, question: AskedQuestion) -> dict[str, Any]:
    """Returns the greedy chat request that asks a question, with its media in it."""
    content: list[dict[str, Any]] = [_part(media) for media in question.media]
    content.append({"type": "text", "text": question.text})
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": _MAX_TOKENS, "temperature": 0}


def _part(media: Media) -> dict[str, Any]:
    url = f"data:{_MIME_TYPES[media.kind]};base64,{base64.b64encode(media.data).decode()}"
    return {"type": f"{media.kind}_url", f"{media.kind}_url": {"url": url}}
