"""Nothing is kept for each connection that was lost, nor for each address that has gone: objects are counted."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet import row_peer
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmMapping
from vitrine_vlm.gateway.servers import ServerFleet
from vitrine_vlm.service_runtime.peers import peer_of
from vitrine_vlm.service_runtime.supervisor import Supervisor

WARM_UP, ROUNDS = 2, 6
COUNTED = ("vitrine_vlm.", "grpc.", "aiohttp.", "_asyncio.")


@pytest.fixture(autouse=True)
def nothing_but_the_test() -> Iterator[None]:
    """Leaves out what was there before, and the log: pytest keeps what is logged, and with it the errors."""
    logging.disable()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)


async def num_objects() -> Counter[str]:
    """By type; of this project, gRPC, aiohttp and asyncio. Garbage is collected first, generators in it are closed."""
    gc.collect()
    await asyncio.sleep(0.05)
    gc.collect()
    names = Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, gc.get_objects()))
    return Counter({name: number for name, number in names.items() if name.startswith(COUNTED)})


async def grown(before: Counter[str]) -> dict[str, int]:
    """The types of which there are more than `before`, by one or more for each round."""
    return {name: number for name, number in (await num_objects() - before).items() if number >= ROUNDS}


class LosesSessions(StubServicer):
    """Ends its session as a lost connection does, whenever `lost` is set."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lost = asyncio.Event()

    async def Connect(self, request_iterator, context):  # type: ignore[no-untyped-def]
        self.lost.clear()
        async with aclosing(self.exporter.connect(request_iterator, peer_of(context))) as responses:
            async for response in responses:
                yield response
                if response.WhichOneof("message") == "session":
                    await self.lost.wait()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")


async def test_of_a_lost_connection_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_peer, "_FIRST_BACKOFF_S", 0.01)
    async with running_stub(tmp_path, servicer_class=LosesSessions) as (address, servicer, _):
        assert isinstance(servicer, LosesSessions)
        client = EncoderClient([address], IDENTITY, transport="shm", shm_folder=tmp_path)
        await client.start()
        (peer,) = client._peers.values()

        async def reconnect() -> None:
            lost = peer.connection
            servicer.lost.set()
            async with asyncio.timeout(10):
                while peer.connection is None or peer.connection is lost:
                    await asyncio.sleep(0.005)

        for _ in range(WARM_UP):
            await reconnect()
        before = await num_objects()
        gc.disable()  # the memory of an encoder that was killed stays until nothing maps it
        try:
            for _ in range(ROUNDS):
                await reconnect()
            assert sum(type(each) is ShmMapping for each in gc.get_objects()) == 1
        finally:
            gc.enable()
        assert not await grown(before)
        await client.close()


async def test_of_addresses_that_have_gone_nothing_is_kept() -> None:
    """Pods that are replaced never have the address of an earlier one again."""
    supervisor = Supervisor()
    async with aiohttp.ClientSession() as session:
        servers = ServerFleet(
            session,
            supervisor,
            tls=None,
            health_path="/health",
            health_interval_s=60.0,
            connect_timeout_s=5.0,
            max_in_flight=1,
        )
        client = EncoderClient([], IDENTITY, supervisor=supervisor)

        async def replace(number: int) -> None:
            addresses = [f"127.0.{number}.1:1", f"127.0.{number}.2:1"]  # where nothing listens
            client.set_addresses(addresses)
            servers.set_addresses(addresses)
            await client.start()
            await servers.attempted()
            async with asyncio.timeout(10):
                while any(name.startswith("leaving") for name in supervisor.names()):
                    await asyncio.sleep(0.005)

        for number in range(WARM_UP):
            await replace(number)
        before, names = await num_objects(), len(supervisor.names())
        for number in range(WARM_UP, WARM_UP + ROUNDS):
            await replace(number)
        assert not await grown(before) and len(supervisor.names()) == names
        await client.close()
        await supervisor.close()
