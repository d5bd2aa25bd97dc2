"""Attacks on the gRPC port of an encoder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc

from benchmarks.attacks.target import Target
from benchmarks.pictures import random_jpegs
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import SERVICE
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS

_MIB = 1024 * 1024
_NUM_UNREAD, _NUM_MALFORMED, _NUM_SESSIONS = 60, 32, 500
_PAUSE_S = 0.5


@asynccontextmanager
async def _channel(target: Target) -> AsyncIterator[grpc.aio.Channel]:
    """A connection of its own, whose windows do not grow: else a stream takes rows that nothing reads."""
    options = [*CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target.encoder, options=options) as channel:
        yield channel


async def _repeated(call: Callable[[], Awaitable[str]], target: Target, num_clients: int, pause_s: float) -> None:
    async def client() -> None:
        while True:
            target.outcomes[await call()] += 1
            await asyncio.sleep(pause_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(client())


def unread(target: Target) -> Callable[[], Awaitable[None]]:
    """60 Encode calls with pictures of 33 MiB whose replies are not read."""
    picture = random_jpegs(1, (1024, 1024))[0]
    item = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=picture + bytes(33 * _MIB - len(picture)))
    request = encoder_pb2.EncodeRequest(items=[item]).SerializeToString()

    async def attack() -> None:
        async with _channel(target) as channel:
            encode = channel.unary_stream(f"/{SERVICE}/Encode", bytes, bytes)

            async def call() -> str:
                return (await encode(request).code()).name

            await _repeated(call, target, _NUM_UNREAD, _PAUSE_S)

    return attack


def malformed(target: Target) -> Callable[[], Awaitable[None]]:
    """32 callers that send three bytes which are no message, each again as soon as it is answered."""

    async def attack() -> None:
        async with _channel(target) as channel:
            describe = channel.unary_unary(f"/{SERVICE}/Describe", bytes, bytes)

            async def call() -> str:
                return (await describe(b"\xff\xff\xff").code()).name

            await _repeated(call, target, _NUM_MALFORMED, 0.0)

    return attack


def sessions(target: Target) -> Callable[[], Awaitable[None]]:
    """500 sessions of one peer, each opened again when it ends."""
    hello = encoder_pb2.ConnectRequest(hello=encoder_pb2.Hello(protocol_version=1, transports=["grpc"]))

    async def only_hello() -> AsyncIterator[bytes]:
        yield hello.SerializeToString()
        await asyncio.Event().wait()

    async def attack() -> None:
        async with _channel(target) as channel:
            connect: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
                f"/{SERVICE}/Connect", None, bytes
            )

            async def call() -> str:
                return (await connect(only_hello()).code()).name

            await _repeated(call, target, _NUM_SESSIONS, _PAUSE_S)

    return attack
