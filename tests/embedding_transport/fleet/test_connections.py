"""Which encoders of a large fleet a client is connected to, against real servers."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.embedding_transport.clients.encoder_stub import IDENTITY, StubServicer, running_stub
from vitrine_vlm.embedding_transport.clients import fleet_client
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.peer_fleet import ConnectionPolicy
from vitrine_vlm.errors import EncoderMismatch, EncoderUnavailable, TicketExpired
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import MediaItem, ModelIdentity, Patches, RowsEvent, Ticket

NUM_ENCODERS, NUM_KEPT = 8, 2
KEPT_FOR_LONG = ConnectionPolicy(NUM_KEPT, idle_s=60)
UNREACHABLE = "127.0.0.1:1"


@pytest.fixture
async def stubs(tmp_path: Path) -> AsyncGenerator[dict[str, StubServicer]]:
    """By their addresses."""
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_stub(tmp_path)) for _ in range(NUM_ENCODERS)]
        yield {address: servicer for address, servicer, _ in running}


@asynccontextmanager
async def client_of(
    folder: Path,
    *addresses: str,
    policy: ConnectionPolicy = KEPT_FOR_LONG,
    expected: ModelIdentity | None = IDENTITY,
    connect_timeout_s: float = 5.0,
) -> AsyncIterator[EncoderClient]:
    supervisor = Supervisor()
    client = EncoderClient(
        addresses,
        expected,
        shm_folder=folder,
        supervisor=supervisor,
        connect_timeout_s=connect_timeout_s,
        connections=policy,
    )
    try:
        await client.start()
        yield client
    finally:
        await client.close()
        assert supervisor.failure is None and supervisor.names() == []


def num_connected(client: EncoderClient) -> int:
    return sum(status.ready for status in client.status())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def encode(client: EncoderClient, text: str, *, release: bool = True) -> RowsEvent:
    item = MediaItem("image", data=text.encode())
    (event,) = [event async for event in client.encode([item], "r") if isinstance(event, RowsEvent)]
    if release:
        event.rows.release()
    return event


async def test_a_small_fleet_is_connected_as_a_whole_and_stays_so(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    async with client_of(tmp_path, *stubs, policy=ConnectionPolicy(NUM_ENCODERS, idle_s=0.1)) as client:
        assert num_connected(client) == NUM_ENCODERS
        await asyncio.sleep(0.5)
        assert num_connected(client) == NUM_ENCODERS


async def test_of_a_large_fleet_some_are_connected_and_the_others_when_they_are_needed(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    async with client_of(tmp_path, *stubs) as client:
        assert client.ready and num_connected(client) == NUM_KEPT
        assert [status.error for status in client.status()] == [None] * NUM_ENCODERS
        assert sum(status.idle for status in client.status()) == NUM_ENCODERS - NUM_KEPT
        assert len(await client.encoder_stats()) == 0  # stubs have none; it asks those that are connected, and no other
        assert num_connected(client) == NUM_KEPT
        for number in range(40):
            await encode(client, f"{number} 5")
        assert num_connected(client) == NUM_ENCODERS
        assert client.stats().retries == 0
        assert [status.in_flight for status in client.status()] == [0] * NUM_ENCODERS


async def test_equal_content_goes_to_the_same_encoder_whoever_is_connected_to_it(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    texts = [f"{number} 5" for number in range(16)]

    async def served_by(client: EncoderClient, text: str) -> str:
        before = {address: stub.num_encodes for address, stub in stubs.items()}
        await encode(client, text)
        (address,) = [address for address, stub in stubs.items() if stub.num_encodes > before[address]]
        return address

    async with client_of(tmp_path, *stubs) as first, client_of(tmp_path, *reversed(stubs)) as second:
        whole = ConnectionPolicy(NUM_ENCODERS)
        async with client_of(tmp_path, *stubs, policy=whole) as connected_to_all:
            for text in texts:
                assert len({await served_by(each, text) for each in (first, second, connected_to_all, first)}) == 1


async def test_idle_connections_are_closed_but_none_with_leases_or_work(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    async with client_of(tmp_path, *stubs, policy=ConnectionPolicy(1, idle_s=0.3)) as client:
        held = await encode(client, "held 5", release=False)
        hanging = asyncio.create_task(encode(client, "hang 5"))
        for number in range(40):
            await encode(client, f"{number} 5")
        assert num_connected(client) > 2
        await until(lambda: sum(peer.num_leases for peer in client._peers.values()) == 1)
        busy = [status.address for status in client.status() if status.in_flight]
        holder = [peer.address for peer in client._peers.values() if peer.num_leases]
        used = set(busy + holder)
        await until(lambda: num_connected(client) == len(used))
        await asyncio.sleep(0.5)
        assert {status.address for status in client.status() if status.ready} == used
        held.rows.check()
        held.rows.release()
        for stub in stubs.values():
            stub.go_on.set()
        await hanging
        await until(lambda: num_connected(client) == 1)
        sessions = sum(stub.exporter.stats().sessions for stub in stubs.values())
        await until(lambda: sum(stub.exporter.stats().sessions for stub in stubs.values()) == 1)
        assert sessions and all(stub.exporter.stats().leases.reclaimed == 0 for stub in stubs.values())
        for number in range(10):  # and opened again
            await encode(client, f"{number} 5")
        assert num_connected(client) > 1 and client.stats().retries == 0


async def test_a_connection_that_is_opened_again_is_no_further_fallback(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with client_of(elsewhere, next(iter(stubs)), policy=ConnectionPolicy(num_kept=0, idle_s=0.05)) as client:
        for _ in range(3):
            await encode(client, "a 5")
            await until(lambda: not client.ready)
        assert client.stats().fallbacks == 1 and client.stats().received_nbytes["grpc"] > 0


async def test_requests_while_connections_are_closed_all_the_time_lose_nothing(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    async with client_of(tmp_path, *stubs, policy=ConnectionPolicy(1, idle_s=0.004)) as client:

        async def ask(name: str) -> None:
            for number in range(40):
                await encode(client, f"{name} {number} 5")
                await asyncio.sleep(0.003)

        await asyncio.gather(*(ask(name) for name in "abcd"))
        assert client.stats().requests == 160 and client.stats().retries == 0
        await until(lambda: all(stub.exporter.stats().live_leases == 0 for stub in stubs.values()))
        assert all(stub.exporter.stats().leases.reclaimed == 0 for stub in stubs.values())


async def test_what_is_lost_of_the_kept_connections_is_replaced(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_stub(tmp_path)) for _ in range(4)]
        async with client_of(tmp_path, *(address for address, _, _ in running)) as client:

            def ready() -> set[str]:
                return {status.address for status in client.status() if status.ready}

            kept = ready()
            for address, _, server in running:
                if address in kept:
                    await server.stop(None)
            await until(lambda: not kept & ready() and num_connected(client) == NUM_KEPT)
            for number in range(8):
                await encode(client, f"{number} 5")
            assert client.stats().retries == 0, "a lost encoder was tried although its loss was noticed"


async def test_a_dead_encoder_of_which_no_one_knew_costs_one_retry(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    addresses = [*list(stubs)[:2], UNREACHABLE]
    async with client_of(tmp_path, *addresses, policy=ConnectionPolicy(num_kept=0)) as client:
        assert num_connected(client) == 0
        for number in range(20):
            await encode(client, f"{number} 5")
        assert client.ready and client.stats().retries == 1
        (dead,) = [status for status in client.status() if status.address == UNREACHABLE]
        assert not dead.ready and not dead.idle and "failed to connect" in (dead.error or "")


async def test_a_host_that_does_not_answer_delays_a_request_by_a_moment(
    stubs: dict[str, StubServicer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_client, "_CONNECT_WAIT_S", 0.2)

    # Nothing accepts what the kernel has accepted, as with a process that is stopped.
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    only = ConnectionPolicy(num_kept=0)
    with silent:
        async with client_of(tmp_path, next(iter(stubs)), address, policy=only, connect_timeout_s=3) as client:
            await next(iter(client._peers.values())).connected(5)
            begin = time.monotonic()
            while not client.stats().retries:
                await encode(client, f"{time.monotonic()} 5")
            assert 0.2 < time.monotonic() - begin < 2, "it waited for the time-out of connecting"


async def test_an_encoder_of_another_model_is_passed_over_and_named_if_there_is_no_other(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    other = ModelIdentity("other", "revision", "qwen3_vl", 8, (1, 2, 3), "float32")
    async with running_stub(tmp_path, other) as (address, servicer, _):
        policy = ConnectionPolicy(num_kept=0)
        async with client_of(tmp_path, address, next(iter(stubs)), policy=policy) as client:
            for number in range(10):
                await encode(client, f"{number} 5")
        async with client_of(tmp_path, address, policy=policy) as client:
            with pytest.raises(EncoderUnavailable, match="serves another model: 'other'"):
                await encode(client, "a 5")
        assert servicer.num_encodes == 0


async def test_an_older_encoder_that_is_connected_for_an_item_is_passed_over(
    stubs: dict[str, StubServicer], tmp_path: Path
) -> None:
    """Stubs have minor version 0 of the protocol, which is known only once they are connected."""
    item = MediaItem("image", patches=Patches(b"0", "uint8", False, (1, 2, 2)))
    async with client_of(tmp_path, *list(stubs)[:3], policy=ConnectionPolicy(num_kept=0)) as client:
        with pytest.raises((EncoderMismatch, EncoderUnavailable), match=r"need encoders with version 1\.1"):
            [event async for event in client.encode([item], "r")]
        assert num_connected(client) == 3 and not any(stub.num_encodes for stub in stubs.values())
        await encode(client, "a 5")


class WithTickets(StubServicer):
    """Has an instance_id."""

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        description = await super().Describe(request, context)
        description.protocol_minor_version, description.instance_id = 1, f"instance {id(self)}"
        return description


async def test_the_encoder_of_a_ticket_is_found_among_those_that_are_not_connected(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        starts = [running_stub(tmp_path, servicer_class=WithTickets) for _ in range(4)]
        running = [await stack.enter_async_context(start) for start in starts]
        policy = ConnectionPolicy(num_kept=1, idle_s=0.3)
        async with client_of(tmp_path, *(address for address, _, _ in running), policy=policy) as client:
            wanted = f"instance {id(running[-1][1])}"
            ticket = MediaItem("image", ticket=Ticket(wanted, bytes(16)))
            with pytest.raises(Exception):  # noqa: B017 the stub cannot read a ticket: what counts is who was asked
                [event async for event in client.encode([ticket], "r")]
            assert [stub.num_encodes for _, stub, _ in running] == [0, 0, 0, 1]
            await until(lambda: num_connected(client) == 1)
            with pytest.raises(Exception):  # noqa: B017
                [event async for event in client.encode([ticket], "r")]
            assert running[-1][1].num_encodes == 2 and num_connected(client) <= 2, "it was known already"
            with pytest.raises(TicketExpired, match="not known here"):
                unknown = MediaItem("image", ticket=Ticket("unknown", bytes(16)))
                [event async for event in client.encode([unknown], "r")]


async def test_an_encoder_that_leaves_while_it_is_connected_for_a_request_is_not_waited_for(tmp_path: Path) -> None:
    class Slow(StubServicer):
        async def Describe(self, request, context):  # type: ignore[no-untyped-def]
            await asyncio.sleep(30)

    async with (
        running_stub(tmp_path, servicer_class=Slow) as slow,
        running_stub(tmp_path) as (address, _, _),
        client_of(tmp_path, slow[0], policy=ConnectionPolicy(num_kept=0)) as client,
    ):
        asking = asyncio.create_task(encode(client, "a 5"))
        await asyncio.sleep(0.1)
        client.set_addresses([address])
        assert (await asyncio.wait_for(asking, 3)).rows.num_tokens == 5


async def test_an_encoder_that_is_lost_while_it_leaves_says_nothing_of_one_at_its_address(tmp_path: Path) -> None:
    async with running_stub(tmp_path) as (address, servicer, _), client_of(tmp_path, address) as client:
        hanging = asyncio.create_task(encode(client, "hang 5"))
        await until(lambda: servicer.num_running == 1)
        (leaving,) = client._peers.values()
        client.set_addresses([])
        client.set_addresses([address])
        await until(lambda: client.ready)
        assert leaving.connection is not None
        await leaving.connection.channel.close()
        await until(lambda: leaving.connection is None)
        with pytest.raises(EncoderUnavailable, match="was lost"):  # a request tries each address once
            await hanging
        assert num_connected(client) == 1
        await encode(client, "b 5")
        client.set_addresses([])
        with pytest.raises(EncoderUnavailable, match="none was found"):
            await encode(client, "c 5")
