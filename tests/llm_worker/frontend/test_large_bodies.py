"""A request is the same, and so is its error, whichever process has read its body."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.llm_worker.frontend.http_client import client_of
from tests.llm_worker.frontend.scripted_generator import scripted
from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.service_runtime import http_requests
from vitrine_vlm.types import MediaItem

CHAT, COMPLETIONS, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"
DATA = bytes(range(256)) * 400
LONG = base64.b64encode(DATA).decode()
URL = f"data:image/png;base64,{LONG}"
FRAMES = f"data:video/jpeg;base64,{LONG},{LONG}"
BROKEN = URL[:-4] + "=A=="
# Around what a parser takes.
DEPTHS = range(196, 200)
HTTP_URL = "https://example.com/a.png"


def image(url: Any = URL, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hé"}, *parts]}], **fields}


def respond(part: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}, part]}]}


def nested(depth: int) -> Any:
    values: Any = 1
    for _ in range(depth):
        values = [values]
    return values


async def asked(
    worker: LocalWorker, route: str, raw: bytes, monkeypatch: pytest.MonkeyPatch, *, large: bool
) -> tuple[int, dict[str, Any], list[GenerationRequest]]:
    monkeypatch.setattr(http_requests, "LARGE_BODY_NBYTES", 0 if large else 1 << 30)
    served = scripted(worker.served, "Hi")
    async with client_of(served) as client:
        headers = {"content-type": "application/json"}
        response = await client.post(route, data=raw, headers=headers)
        generator: Any = served.generator
        found = [replace(each, request_id="") for each in generator.requests]
        return response.status, await response.json(), found


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, chat(image(), image(HTTP_URL), image(), mm_processor_kwargs={"min_pixels": 4096})),
        (CHAT, chat(image(min_pixels=1024), {"type": "text", "text": URL})),
        (CHAT, chat({"type": "video_url", "video_url": {"url": FRAMES}, "fps": 2})),
        (CHAT, chat({"type": "video", "video": [URL, HTTP_URL, URL]})),
        (CHAT, chat({"type": "video", "video": FRAMES})),
        (CHAT, chat(image(BROKEN))),
        (CHAT, chat({"type": "video", "video": [URL, BROKEN]})),
        (CHAT, chat(image(), max_tokens="many")),
        (CHAT, chat({"type": "image_url", "image_url": URL})),
        (CHAT, chat({"type": "image_url", "image_url": [URL]})),
        (CHAT, chat({"type": "image_url", "video_url": {"url": URL}})),
        (CHAT, chat({"type": "image_url", "image_url": {"url": [URL]}})),
        (CHAT, {"messages": URL}),
        (CHAT, {"messages": [{"role": "user", "content": URL}]}),
        (CHAT, {"messages": [URL, {"role": URL, "content": {"url": URL}}]}),
        (RESPONSES, respond({"type": "input_image", "image_url": URL})),
        (RESPONSES, respond({"type": "input_image", "image_url": BROKEN})),
        (RESPONSES, {"input": "Hi", "metadata": {"video": URL}}),
        *((CHAT, chat(image(), zzz=nested(depth))) for depth in DEPTHS),
        (COMPLETIONS, {"prompt": "Hi", "media": [image()], "stop": "a"}),
        (COMPLETIONS, {"prompt": [URL[:300]], "media": {"video": URL}}),
        (TOKENIZE, chat(image())),
    ],
)
async def test_the_same_request(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch, route: str, fields: dict[str, Any]
) -> None:
    raw = json.dumps({"model": worker.served.name, **fields}).encode()
    status, answer, requests = await asked(worker, route, raw, monkeypatch, large=False)
    status_of_large, answer_of_large, requests_of_large = await asked(worker, route, raw, monkeypatch, large=True)
    assert (status_of_large, requests_of_large) == (status, requests)
    if status != 200:
        assert answer_of_large == answer


async def test_the_media_of_a_large_body(worker: LocalWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"model": worker.served.name, **chat(image())}).replace("/", "\\/").encode()  # as PHP writes it
    _, _, (request,) = await asked(worker, CHAT, raw, monkeypatch, large=True)
    assert request.media == (MediaItem("image", data=DATA),)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "the body is no JSON: EOF"),
        (b"[]", "no JSON object but a list"),
        (b'{"a": "' + b"a" * (1 << 20) + b'", "b": ' + b"1" * 401 + b"}", "a number of more than 400 digits"),
        (b'{"messages": "\xff"}', "the body is no JSON"),
        (b'{"messages": "\\ud800"}', "the body is no JSON"),
    ],
)
async def test_what_is_no_request(
    worker: LocalWorker, monkeypatch: pytest.MonkeyPatch, raw: bytes, message: str
) -> None:
    answers = [(await asked(worker, CHAT, raw, monkeypatch, large=large))[:2] for large in (False, True)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 400 and message in answers[0][1]["error"]["message"]
