"""Clients that keep asking until they are stopped, and count what they get."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import aiohttp
import grpc
from PIL import Image

from tests.deploy.ray_serve.running import Running
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc

QUESTION = "What shapes and colors are in this picture?"
_numbers = itertools.count()


def next_picture(size: tuple[int, int] = (448, 320)) -> bytes:
    """One that no encoder has seen: of another color than all before.

    Args:
        size: width and height, in pixels.
    """
    number = next(_numbers)
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 128)).save(file, "PNG")
    return file.getvalue()


async def encode(channel: grpc.aio.Channel, pictures: list[bytes]) -> list[tuple[encoder_pb2.Layout, bytes]]:
    """Layout and rows of every picture, put together from what the ingress streams."""
    items = [encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=picture) for picture in pictures]
    layouts: dict[int, encoder_pb2.Layout] = {}
    rows = [bytearray() for _ in pictures]
    async for response in encoder_pb2_grpc.EncoderStub(channel).Encode(encoder_pb2.EncodeRequest(items=items)):
        event = response.WhichOneof("event")
        if event == "layout":
            assert response.layout.item_index not in layouts, "a layout came twice"
            layouts[response.layout.item_index] = response.layout
        elif event == "chunk":
            part = rows[response.chunk.item_index]
            assert response.chunk.offset == len(part), "rows came twice or are missing"
            part += response.chunk.data
        else:
            raise RuntimeError(str(response.failed))
    return [(layouts[index], bytes(part)) for index, part in enumerate(rows)]


async def chat(session: aiohttp.ClientSession, picture: bytes, model: str) -> str:
    """The answer to QUESTION, not streamed."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0}
    async with session.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["choices"][0]["message"]["content"])


@dataclass
class Load:
    """Counts requests that came back whole, and notes what went wrong with the others."""

    model: str
    pause_s: float
    size: tuple[int, int]
    num_encoded: int = 0
    num_chats: int = 0
    errors: list[str] = field(default_factory=list)
    stopping: bool = False

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        application: Running,
        model: str,
        *,
        num_encoding: int,
        num_chatting: int,
        pause_s: float = 0.0,
        size: tuple[int, int] = (448, 320),
    ) -> AsyncIterator[Load]:
        """At the end every request that was begun is waited for.

        Args:
            num_encoding, num_chatting: clients of the two ingresses, each with one request at a time.
            pause_s: of a client between its requests.
            size: of the pictures, in pixels.
        """
        load = cls(model, pause_s, size)
        async with (
            grpc.aio.insecure_channel(application.grpc_address) as channel,
            aiohttp.ClientSession(application.base_url, timeout=aiohttp.ClientTimeout(None)) as session,
        ):
            clients = [asyncio.create_task(load._encode(channel)) for _ in range(num_encoding)]
            clients += [asyncio.create_task(load._chat(session)) for _ in range(num_chatting)]
            try:
                yield load
            finally:
                load.stopping = True
                await asyncio.gather(*clients)

    async def _encode(self, channel: grpc.aio.Channel) -> None:
        while not self.stopping:
            with self._noting_errors():
                [(layout, rows)] = await encode(channel, [next_picture(self.size)])
                assert rows and len(rows) % layout.num_tokens == 0, f"{len(rows)} bytes for {layout}"
                self.num_encoded += 1
            await asyncio.sleep(self.pause_s)

    async def _chat(self, session: aiohttp.ClientSession) -> None:
        while not self.stopping:
            with self._noting_errors():
                assert await chat(session, next_picture(self.size), self.model), "no answer"
                self.num_chats += 1
            await asyncio.sleep(self.pause_s)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.errors.append(repr(error))
