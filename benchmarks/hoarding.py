"""Measures what a peer that hoards costs another one: sessions, and leases that it never releases.

    python -m benchmarks.hoarding --encoder 127.0.0.1:50051 --shm-folder /dev/shm

The encoder is any running one, best with a small pool (`--pool-bytes 4194304`) and a small model.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.grpc_channel import open_channel
from vitrine_vlm.types import EmbeddingRows, MediaItem, RowsEvent

_NUM_SESSIONS = 500
_NUM_HOARDING = 4  # items in flight: few, so that it fills the pool and not the tower
_NUM_QUESTIONS = 20
_PAUSE_S = 0.5
_numbers = itertools.count()


def picture() -> MediaItem:
    """Another one each time, 448 pixels wide."""
    noise = np.random.default_rng(next(_numbers)).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return MediaItem("image", data=file.getvalue())


async def rows_of(client: EncoderClient) -> EmbeddingRows:
    events = [event async for event in client.encode([picture()], "hoarding")]
    return next(event.rows for event in events if isinstance(event, RowsEvent))


async def num_sessions(address: str) -> int:
    """How many of the Connect calls of one peer get a session."""
    hello = encoder_pb2.ConnectRequest(hello=encoder_pb2.Hello(protocol_version=1, transports=["grpc"]))

    async def connect(stub: encoder_pb2_grpc.EncoderAsyncStub) -> bool:
        call = stub.Connect()
        calls.append(call)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(hello)
            return isinstance(await call.read(), encoder_pb2.ConnectResponse)
        return False

    calls: list[grpc.aio.StreamStreamCall[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]] = []
    async with open_channel(address) as channel:
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        accepted = await asyncio.gather(*(connect(stub) for _ in range(_NUM_SESSIONS)))
        for call in calls:
            call.cancel()
    return sum(accepted)


async def question_times(client: EncoderClient) -> tuple[list[float], int]:
    """Seconds from a picture to its rows, sorted, and how many pictures were refused."""
    times, num_refused = [], 0
    for _ in range(_NUM_QUESTIONS):
        begin = time.perf_counter()
        try:
            (await rows_of(client)).release()
        except Overloaded:
            num_refused += 1
        times.append(time.perf_counter() - begin)
        await asyncio.sleep(_PAUSE_S)
    return sorted(times), num_refused


async def hoard(client: EncoderClient, held: list[EmbeddingRows]) -> None:
    while True:
        with suppress(Overloaded):
            held.append(await rows_of(client))


def show(name: str, times: list[float], num_refused: int) -> None:
    median, longest = times[len(times) // 2], times[-1]
    print(f"{name}: median {median:.3f} s, longest {longest:.3f} s, {num_refused} of {len(times)} refused")


async def main(address: str, shm_folder: Path) -> None:
    print(f"sessions of one peer: {await num_sessions(address)} of {_NUM_SESSIONS}")
    async with AsyncExitStack() as stack:
        hoarder, victim = (EncoderClient([address], None, shm_folder=shm_folder) for _ in range(2))
        for client in (hoarder, victim):
            stack.push_async_callback(client.close)
            await client.start()
        show("a picture alone", *await question_times(victim))
        held: list[EmbeddingRows] = []
        hoarding = [asyncio.create_task(hoard(hoarder, held)) for _ in range(_NUM_HOARDING)]
        await asyncio.sleep(3)
        show("beside a peer that releases nothing", *await question_times(victim))
        print(f"rows by transport: hoarder {hoarder.stats().received_nbytes}, other {victim.stats().received_nbytes}")
        for task in hoarding:
            task.cancel()
        await asyncio.gather(*hoarding, return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--encoder", required=True, help="its address, host:port")
    parser.add_argument("--shm-folder", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    asyncio.run(main(arguments.encoder, arguments.shm_folder))
