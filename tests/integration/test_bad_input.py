"""Every bad input gets a clear error in both protocols, and the service goes on serving."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web
from PIL import Image

from tests.integration.fleet import Fleet
from tests.integration.media import picture
from tests.integration.media_server import MediaServer, serve_media
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What?"


def truncated_png() -> bytes:
    return picture(1, 96, 96).data[:-200]


def png_bomb() -> bytes:
    """A hundred bytes that declare 3.6 gigapixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def too_wide_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3300, 16)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class BadMedia:
    """What to send as the image, and the answer it must get."""

    url: Callable[[MediaServer], str]
    http_status: int
    code: str
    grpc_status: grpc.StatusCode
    says: str


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD_MEDIA = {
    "no_such_host": BadMedia(
        lambda server: "http://no-such-host.invalid/a.png",
        400,
        "media_unreachable",
        grpc.StatusCode.FAILED_PRECONDITION,
        "no-such-host.invalid",
    ),
    "not_found": BadMedia(
        lambda server: server.url("/missing.png"), 400, "media_not_found", grpc.StatusCode.NOT_FOUND, "404"
    ),
    "timeout": BadMedia(
        lambda server: server.url("/hangs.png"), 400, "media_timeout", grpc.StatusCode.DEADLINE_EXCEEDED, "s"
    ),
    "file_not_allowed": BadMedia(
        lambda server: "file:///etc/passwd", 400, "media_not_allowed", grpc.StatusCode.PERMISSION_DENIED, "file"
    ),
    "not_an_image": BadMedia(lambda server: data_url(b"hello, I am text"), 400, "not_an_image", INVALID, "image"),
    "truncated": BadMedia(lambda server: data_url(truncated_png()), 400, "media_truncated", INVALID, "too early"),
    "bomb": BadMedia(lambda server: data_url(png_bomb()), 400, "media_too_large", INVALID, "60000"),
    "aspect_ratio": BadMedia(lambda server: data_url(too_wide_png()), 400, "bad_aspect_ratio", INVALID, "200"),
}


@pytest.fixture
async def media_server() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


async def chat(fleet: Fleet, content: list[dict[str, Any]], **fields: Any) -> tuple[int, dict[str, Any]]:
    url = f"http://{fleet.worker_processes['shm'].addresses['http']}/v1/chat/completions"
    body = {"model": fleet.folder.name, "max_tokens": 4, "messages": [{"role": "user", "content": content}], **fields}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


async def assert_still_serving(fleet: Fleet) -> None:
    status, body = await chat(fleet, [image_part(data_url(picture(1, 64, 64).data)), {"type": "text", "text": "What?"}])
    assert status == 200, body
    assert body["usage"]["completion_tokens"] > 0


async def grpc_error(fleet: Fleet, prompt: llm_pb2.Prompt) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(fleet.worker_processes["shm"].addresses["grpc"]) as channel:
        request = llm_pb2.GenerateRequest(prompt=prompt, sampling=llm_pb2.SamplingParams(max_tokens=4))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in llm_pb2_grpc.LlmStub(channel).Generate(request):
                pass
    return caught.value


def error_code(error: grpc.aio.AioRpcError) -> str:
    return str(dict(error.trailing_metadata() or ())["vitrine-error-code"])


@pytest.mark.parametrize("name", list(BAD_MEDIA))
async def test_bad_media(small_fleet: Fleet, media_server: MediaServer, name: str) -> None:
    case = BAD_MEDIA[name]
    url = case.url(media_server)

    status, body = await chat(small_fleet, [image_part(url), {"type": "text", "text": "What?"}])

    assert (status, body["error"]["code"]) == (case.http_status, case.code), body
    assert case.says in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}

    media = [llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, url=url)]
    error = await grpc_error(small_fleet, llm_pb2.Prompt(text=PROMPT, media=media))
    assert (error.code(), error_code(error)) == (case.grpc_status, case.code)
    assert case.says in (error.details() or "")

    await assert_still_serving(small_fleet)


async def test_one_bad_image_among_good_ones_fails_the_request_and_frees_the_others(small_fleet: Fleet) -> None:
    good = image_part(data_url(picture(2, 96, 64).data))
    status, body = await chat(small_fleet, [good, image_part(data_url(b"no image")), good])
    assert (status, body["error"]["code"]) == (400, "not_an_image"), body
    await assert_still_serving(small_fleet)


async def test_unknown_model(small_fleet: Fleet) -> None:
    status, body = await chat(small_fleet, [{"type": "text", "text": "Hi"}], model="no-such-model")
    assert (status, body["error"]["code"]) == (404, "model_not_found"), body
    assert "no-such-model" in body["error"]["message"]


async def test_too_many_items(small_fleet: Fleet) -> None:
    part = image_part(data_url(picture(1, 64, 64).data))
    status, body = await chat(small_fleet, [part] * 200)
    assert (status, body["error"]["code"]) == (400, "too_many_items"), body
    assert "200" in body["error"]["message"]
    media = [llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, data=picture(1, 64, 64).data)] * 200
    error = await grpc_error(small_fleet, llm_pb2.Prompt(text=PROMPT * 200, media=media))
    assert (error.code(), error_code(error)) == (INVALID, "too_many_items")
    await assert_still_serving(small_fleet)


async def test_prompt_longer_than_the_context(small_fleet: Fleet) -> None:
    status, body = await chat(small_fleet, [{"type": "text", "text": "x" * 20_000}])
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded"), body
    error = await grpc_error(small_fleet, llm_pb2.Prompt(text="x" * 20_000))
    assert (error.code(), error_code(error)) == (INVALID, "context_length_exceeded")
    await assert_still_serving(small_fleet)


@pytest.mark.parametrize("text", ["no placeholder at all", PROMPT * 3])
async def test_placeholder_count_mismatch(small_fleet: Fleet, text: str) -> None:
    media = [llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, data=picture(1, 96, 64).data)]
    error = await grpc_error(small_fleet, llm_pb2.Prompt(text=text, media=media))
    assert (error.code(), error_code(error)) == (INVALID, "placeholder_mismatch")
    # In a chat, where the template writes the placeholders, those of the client are text.
    parts = [image_part(data_url(picture(1, 96, 64).data)), {"type": "text", "text": text}]
    status, body = await chat(small_fleet, parts)
    assert status == 200, body
    await assert_still_serving(small_fleet)


async def test_invalid_json_and_unknown_route(small_fleet: Fleet) -> None:
    base = f"http://{small_fleet.worker_processes['shm'].addresses['http']}"
    async with aiohttp.ClientSession() as session:
        json_type = {"Content-Type": "application/json"}
        async with session.post(f"{base}/v1/chat/completions", data=b"{nope", headers=json_type) as response:
            assert response.status == web.HTTPBadRequest.status_code
            assert (await response.json())["error"]["code"] == "invalid_request"
        async with session.get(f"{base}/v1/nothing") as response:
            assert response.status == web.HTTPNotFound.status_code
