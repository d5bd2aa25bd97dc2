"""The HTTP port of an encoder inside the test's process, and receivers like those of a scheduler's ranks."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web

from tests.encoder_service.running import RunningEncoder
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.encoder_service.sglang.http_port import Delivery, SglangHttp
from vitrine_vlm.encoder_service.sglang.part_encoder import LocalPartEncoder
from vitrine_vlm.encoder_service.sglang.receivers import AllowedReceivers
from vitrine_vlm.encoder_service.sglang.versions import receiver_class
from vitrine_vlm.encoder_service.sglang.zmq_push import ZmqPush
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.running_calls import RunningCalls


class Receiver:
    """A PULL socket, as each rank of a scheduler has one."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self._socket = context.socket(zmq.PULL)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def read(self, timeout_s: float = 10.0) -> list[bytes]:
        return list(await asyncio.wait_for(self._socket.recv_multipart(), timeout_s))

    async def is_silent(self) -> bool:
        return not await self._socket.poll(300)


@dataclass
class Answer:
    status: int
    body: Any


@dataclass
class Port:
    url: str
    http: SglangHttp
    budget: ByteBudget
    calls: RunningCalls
    reasons: list[str]
    session: aiohttp.ClientSession
    context: zmq.asyncio.Context = field(repr=False)

    def receiver(self) -> Receiver:
        return Receiver(self.context)

    async def post(self, path: str, body: Any) -> Answer:
        async with self.session.post(f"{self.url}{path}", json=body) as response:
            return Answer(response.status, await response.json())

    async def register(self, req_id: str, receiver: Receiver, num_receivers: int = 1) -> Answer:
        body = {"req_id": req_id, "receive_count": num_receivers, "receive_url": receiver.url, "modality": "IMAGE"}
        return await self.post("/scheduler_receive_url", body)


def encode_body(*items: Any, **changed: Any) -> dict[str, Any]:
    """As SGLang sends it, for one part of pictures."""
    return {
        "encoder_idx": 0,
        "encoder_url": "http://127.0.0.1:1",
        "mm_items": list(items),
        "num_parts": 1,
        "part_idx": 0,
        "req_id": "r_local_part_0",
        "modality": "IMAGE",
        "prefill_host": "127.0.0.1",
        "embedding_port": None,
        "time_stats_json": None,
        **changed,
    }


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@asynccontextmanager
async def run_port(
    encoder: RunningEncoder,
    *,
    receivers: str = "127.0.0.1",
    timeout_s: float = 10.0,
    max_held_bytes: int = 1 << 30,
    folder: Path | None = None,
    loaded: bool = True,
) -> AsyncIterator[Port]:
    allowed, push = AllowedReceivers(receivers), ZmqPush()
    calls, budget, reasons = RunningCalls(), ByteBudget(max_held_bytes, "SGLang's", "--sglang-max-held-bytes"), [""]
    delivery = Delivery(receiver_class("0.5.20"), allowed, push, timeout_s)
    http = SglangHttp(delivery, calls, budget, encoder.metrics, lambda: reasons[0])
    loader = MediaLoader(MediaLimits(allow_private_addresses=True, allowed_folder=folder))
    if loaded:
        http.open(LocalPartEncoder(encoder.service, encoder.identity.row_nbytes), loader, encoder.identity.model)
    runner = web.AppRunner(http.application(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    context = zmq.asyncio.Context()
    try:
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield Port(url, http, budget, calls, reasons, session, context)
    finally:
        await runner.cleanup()
        await loader.close()
        await push.close()
        allowed.close()
        context.destroy(linger=0)
