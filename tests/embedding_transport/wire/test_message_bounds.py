"""Messages of a gRPC port: read a few at a time, counted, and replies that are not read end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules, for_allowed_peers
from vitrine_vlm.embedding_transport.wire.grpc_status import abort, error_from_rpc, send
from vitrine_vlm.embedding_transport.wire.message_bounds import MessageBounds
from vitrine_vlm.embedding_transport.wire.pieces_context import max_piece_message_nbytes, takes_pieces
from vitrine_vlm.embedding_transport.wire.reading_slots import MAX_READING
from vitrine_vlm.embedding_transport.wire.unread_replies import MAX_UNREAD
from vitrine_vlm.errors import BadRequest, Overloaded
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.grpc_requests import handler_of_kind
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.port_limits import PortLimits
from vitrine_vlm.service_runtime.shared_timeout import SharedTimeout

MIB = 1 << 20
TIMEOUT_S = 1.0
BUDGET = 32 * MIB


class Serving:
    """Methods of raw bytes.

    `/s/Keep` answers once the gate is open, `/s/Stream` sends without end, `/s/Session` answers its first message
    and then lasts, as Connect does, and `/s/Pieces` takes messages of up to 1 MiB until one is empty, which it refuses.
    """

    def __init__(self) -> None:
        self.budget = ByteBudget(BUDGET)
        limits = PortLimits(max_body_nbytes=8 * MIB, client_timeout_s=TIMEOUT_S, max_connections=8)
        self.bounds = MessageBounds(self.budget, limits)
        self.gate = asyncio.Event()
        self.num_kept = 0
        self.ended: list[str] = []
        self.server = ServiceServer(
            limits=limits,
            interceptors=[self.bounds],
        )
        handlers: dict[str, Any] = {
            "Keep": grpc.unary_unary_rpc_method_handler(self._keep, bytes, bytes),
            "Pieces": grpc.stream_stream_rpc_method_handler(self._pieces, bytes, bytes),
            "Session": grpc.stream_stream_rpc_method_handler(self._session, bytes, bytes),
            "Stream": grpc.unary_stream_rpc_method_handler(self._stream, bytes, bytes),
            "Parse": grpc.unary_unary_rpc_method_handler(self._keep, encoder_pb2.EncodeRequest.FromString, bytes),
        }
        self.server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))

    async def _keep(self, request: bytes, context: Any) -> bytes:
        self.num_kept += 1
        await self.gate.wait()
        return b"%d" % len(request)

    async def _session(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async for first in requests:
            await send(context, b"%d" % len(first))
            await self.gate.wait()

    @takes_pieces(MIB)
    async def _pieces(self, requests: AsyncIterator[bytes], context: Any) -> None:
        try:
            async for piece in requests:
                if not piece:
                    raise BadRequest("an empty piece")
                await send(context, b"%d" % len(piece))
        except BadRequest as error:
            await abort(context, error)

    async def _stream(self, request: bytes, context: Any) -> None:
        try:
            while True:
                await send(context, b"a" * MIB)
        except asyncio.CancelledError as error:
            self.ended.append(str(error))
            raise
        except Exception as error:
            await abort(context, error)


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    serving = Serving()
    serving.address = await serving.server.start("127.0.0.1", 0)  # type: ignore[attr-defined]
    yield serving
    serving.gate.set()
    await serving.server.stop(0)


@asynccontextmanager
async def connected(serving: Any) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_send_message_length", 64 * MIB), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(serving.address, options=options) as channel:
        yield channel


def method(kind: Any, name: str) -> Any:
    """A method that takes and gives bytes."""
    return kind(f"/s/{name}")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def keep(channel: grpc.aio.Channel, nbytes: int, **options: Any) -> Any:
    return asyncio.ensure_future(method(channel.unary_unary, "Keep")(b"a" * nbytes, **options))


async def test_large_messages_share_the_budget_and_small_ones_pass(serving: Serving) -> None:
    """28 of 32 MiB are for large messages: seven of 4 MiB."""
    async with connected(serving) as channel:
        calls = [keep(channel, 4 * MIB) for _ in range(10)]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 3:
            done, _ = await asyncio.wait(calls, timeout=0.05)
        for call in done:
            refused = call.exception()
            assert isinstance(refused, grpc.aio.AioRpcError)
            error = error_from_rpc(refused)
            assert isinstance(error, Overloaded) and error.retry_after_s >= 1 and "--max-held-bytes" in str(error)
        assert serving.budget.reserved_nbytes == 28 * MIB and serving.num_kept == 7
        small = keep(channel, MIB)
        await asyncio.sleep(0.2)
        serving.gate.set()
        assert await small == b"%d" % MIB
        assert [await call for call in calls if call not in done] == [b"%d" % (4 * MIB)] * 7
        assert serving.budget.reserved_nbytes == 0


async def test_a_message_that_does_not_arrive_is_not_waited_for(serving: Serving) -> None:
    """A sender that opens calls and sends nothing has the slots of its address only until the time-out."""
    async with connected(serving) as channel:
        open_calls = [method(channel.stream_unary, "Keep")() for _ in range(2 * MAX_READING)]
        serving.gate.set()
        await asyncio.sleep(TIMEOUT_S / 2)
        assert await keep(channel, 10, timeout=10 * TIMEOUT_S) == b"10"
        for call in open_calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = error_from_rpc(caught.value)
            assert isinstance(error, BadRequest | Overloaded), caught.value
            assert isinstance(error, Overloaded) or "within 1 s (--client-timeout-s)" in str(error)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_refused(serving: Serving, compression: grpc.Compression) -> None:
    """This one would have 16 MiB, and twice the limit."""
    async with connected(serving) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await keep(channel, 16 * MIB, compression=compression)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert serving.num_kept == 0


async def test_a_message_over_the_limit_is_refused(serving: Serving) -> None:
    async with connected(serving) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await keep(channel, 8 * MIB + 1)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and serving.num_kept == 0


async def test_what_is_no_message_is_an_invalid_request(serving: Serving) -> None:
    async with connected(serving) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(channel.unary_unary, "Parse")(b"\xff\xff")
        assert isinstance(error_from_rpc(caught.value), BadRequest)


async def test_replies_that_are_not_read_end_and_are_counted_until_the_peer_leaves(serving: Serving) -> None:
    async with connected(serving) as channel:
        calls = [method(channel.unary_stream, "Stream")(b"a") for _ in range(3)]
        async with asyncio.timeout(20):
            while len(serving.ended) < 3:
                await asyncio.sleep(0.05)
        assert set(serving.ended) == {"the peer does not read"}
        assert 0 < serving.budget.reserved_nbytes <= 3 * MIB
        for call in calls:
            call.cancel()
        async with asyncio.timeout(10):
            while serving.budget.reserved_nbytes:
                await asyncio.sleep(0.05)


async def test_a_connection_with_unread_replies_is_refused_and_others_are_not(serving: Serving) -> None:
    serving.gate.set()
    replies = serving.bounds._replies
    replies.timeout, replies._unread_after_s = SharedTimeout(60.0), math.inf
    async with connected(serving) as channel, connected(serving) as other:
        calls = [method(channel.unary_stream, "Stream")(b"a") for _ in range(MAX_UNREAD)]
        await until(lambda: sum(map(len, replies._waiting.values())) == MAX_UNREAD)
        assert await keep(channel, 10, timeout=5) == b"10", "what waits for a moment is not unread"
        replies._unread_after_s = 0.0
        async with asyncio.timeout(10):
            while True:
                try:
                    await keep(channel, 10)
                except grpc.aio.AioRpcError as refused:
                    error = error_from_rpc(refused)
                    break
                await asyncio.sleep(0.02)
        assert isinstance(error, Overloaded) and "have not been read" in str(error)
        assert await keep(other, 10) == b"10"
        for call in calls:
            call.cancel()
        await asyncio.sleep(0.2)
        assert await keep(channel, 10) == b"10"


async def test_calls_that_wait_for_a_slot_are_refused_once_replies_are_unread(serving: Serving) -> None:
    bounds = serving.bounds
    bounds._timeout = bounds._replies.timeout = SharedTimeout(60.0)
    bounds._replies._unread_after_s = math.inf
    async with connected(serving) as channel:
        streams = [method(channel.unary_stream, "Stream")(b"a") for _ in range(MAX_UNREAD)]
        await until(lambda: sum(map(len, bounds._replies._waiting.values())) == MAX_UNREAD)
        reading = [method(channel.stream_unary, "Keep")() for _ in range(2)]
        await until(lambda: bounds._reading._num_of_host.total() == 2)
        waiting = keep(channel, 10, timeout=20)
        await until(lambda: len(bounds._reading._waiting) == 1)
        bounds._replies._unread_after_s = 0.0
        await reading[0].write(b"a")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert "have not been read" in (caught.value.details() or "")
        for call in streams + reading:
            call.cancel()


async def test_slots_that_have_read_large_messages_pause(serving: Serving) -> None:
    """Meanwhile requests of other connections are read."""
    serving.gate.set()
    serving.bounds._copy_s_per_byte = 2e-8  # 4 MiB: 0.34 s for each slot in use
    async with connected(serving) as channel, connected(serving) as other:
        begin = asyncio.get_running_loop().time()
        large = [keep(channel, 4 * MIB) for _ in range(4)]
        await asyncio.sleep(0.1)
        assert await keep(other, 10) == b"10"
        assert asyncio.get_running_loop().time() - begin < 0.3
        await asyncio.gather(*large)
        assert asyncio.get_running_loop().time() - begin > 0.3, "the third began once a slot had paused"


async def test_a_message_that_is_not_read_stays_with_its_sender(serving: Serving) -> None:
    """Also on a connection that was fast so far."""
    serving.gate.set()
    async with connected(serving) as other:
        for _ in range(20):
            await keep(other, MIB)
        reading = [method(other.stream_unary, "Keep")() for _ in range(2)]
        await asyncio.sleep(0.1)
        waiting = method(other.stream_unary, "Keep")()
        writing = asyncio.ensure_future(waiting.write(b"a" * MIB))
        await asyncio.sleep(0.4 * TIMEOUT_S)
        assert not writing.done()
        for call in (*reading, waiting):
            call.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_pauses_are_longer_where_replies_are_unread(serving: Serving) -> None:
    serving.gate.set()
    serving.bounds._copy_s_per_byte = 2e-9  # 4 MiB: 0.03 s for each slot in use
    replies = serving.bounds._replies
    serving.bounds._timeout = replies.timeout = SharedTimeout(60.0)
    async with connected(serving) as channel:
        streams = [method(channel.unary_stream, "Stream")(b"a") for _ in range(MAX_UNREAD - 1)]
        async with asyncio.timeout(10):
            while max(map(replies.slowdown, replies._waiting), default=1) < MAX_UNREAD:
                await asyncio.sleep(0.01)
        begin = asyncio.get_running_loop().time()
        await asyncio.gather(*(keep(channel, 4 * MIB) for _ in range(3)))
        assert asyncio.get_running_loop().time() - begin > 0.2, "the third began once a slot had paused"
        for call in streams:
            call.cancel()


async def test_messages_of_a_stream_are_small_and_read_in_turn(serving: Serving) -> None:
    """Reflection would have an answer of the same size for each, and take any number of them at once."""
    info = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    small = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
    large = reflection_pb2.ServerReflectionRequest(host="a" * 2 * MIB).SerializeToString()
    async with connected(serving) as channel:
        call: Any = channel.stream_stream(info, bytes, reflection_pb2.ServerReflectionResponse.FromString)()
        for _ in range(2):
            await call.write(small)
            assert (await call.read()).list_services_response.service
        await call.write(large)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "up to 65536" in (await call.details() or "")
        assert serving.budget.reserved_nbytes == 0


async def test_a_stream_that_a_coroutine_serves_has_small_messages(serving: Serving) -> None:
    async with connected(serving) as channel:
        call = method(channel.stream_stream, "Session")()
        await call.write(b"a" * (2 * MIB))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"a message of {2 * MIB} bytes: a stream takes up to 65536" in await call.details()
        assert serving.budget.reserved_nbytes == 0


async def test_pieces_count_and_leave_their_slots(serving: Serving) -> None:
    slots = serving.bounds._reading._num_of_host
    serving.gate.set()
    async with connected(serving) as channel:
        call = method(channel.stream_stream, "Pieces")()
        for number, nbytes in enumerate([100, MIB, 100]):
            await call.write(b"a" * nbytes)
            assert await call.read() == b"%d" % nbytes
            assert serving.budget.reserved_nbytes == [100, MIB + 100, MIB + 200][number]
        await until(lambda: slots.total() == 1)  # it waits for its next piece
        assert await keep(channel, MIB) == b"%d" % MIB
        call.cancel()
        await until(lambda: not slots.total() and not serving.budget.reserved_nbytes)


def test_what_a_method_declares_is_known_behind_all_that_wraps_it(serving: Serving) -> None:
    handler = grpc.stream_stream_rpc_method_handler(serving._pieces, bytes, bytes)
    rules = PeerRules(may_call=lambda peer: True)
    wrapped = handler_of_kind(for_allowed_peers({"Pieces": handler}, rules)["Pieces"], lambda: None, bytes)
    assert max_piece_message_nbytes(handler) == max_piece_message_nbytes(wrapped) == MIB
    assert max_piece_message_nbytes(grpc.stream_stream_rpc_method_handler(serving._session, bytes, bytes)) is None


async def test_what_comes_behind_a_refused_piece_is_not_kept(serving: Serving) -> None:
    """It is read until the client has written all, or 8 MiB."""
    slots = serving.bounds._reading._num_of_host
    async with connected(serving) as channel:
        call = method(channel.stream_stream, "Pieces")()
        await call.write(b"a" * MIB)
        await call.read()
        await call.write(b"")
        await until(lambda: serving.budget.reserved_nbytes == 0)
        for _ in range(7):
            await call.write(b"a" * MIB)
        assert serving.budget.reserved_nbytes == 0
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT and await call.details() == "an empty piece"
        await until(lambda: not slots.total())
        call = method(channel.stream_stream, "Pieces")()
        await call.write(b"")
        num_written = 0
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while num_written < 100:
                await call.write(b"a" * MIB)
                num_written += 1
        assert 8 <= num_written < 100
        await until(lambda: not slots.total() and not serving.budget.reserved_nbytes)


async def test_a_session_lasts_and_one_that_does_not_begin_ends(serving: Serving) -> None:
    """And those that wait for a message keep no other method waiting."""
    async with connected(serving) as channel:
        lasting = method(channel.stream_stream, "Session")()
        await lasting.write(b"hello")
        assert await lasting.read() == b"5"
        silent = [method(channel.stream_stream, "Session")() for _ in range(2 * MAX_READING)]
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        assert not any(call.done() for call in silent)
        for call in silent:
            assert await call.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
        await lasting.write(b"next")  # longer after the first message than one may take to arrive
        serving.gate.set()
        assert await lasting.read() == b"4"


async def test_silent_streams_keep_slots_for_a_moment_only(serving: Serving) -> None:
    """The peer of a session may take longer for its next message, as where it maps a pool."""
    bounds = serving.bounds
    bounds._timeout, bounds._first_timeout = SharedTimeout(60.0), SharedTimeout(0.3)
    async with connected(serving) as channel:
        silent = [method(channel.stream_stream, "Session")() for _ in range(2)]
        await until(lambda: bounds._reading_of_streams._num_of_host.total() == 2)
        call = method(channel.stream_stream, "Session")(timeout=20)
        await call.write(b"hello")
        assert await call.read() == b"5"
        for each in silent:
            assert await each.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert await each.details() == "no message came within 0.3 s of the call: send the first one with it"
        serving.gate.set()
        await asyncio.sleep(0.6)
        await call.write(b"next")
        assert await call.read() == b"4"


async def test_connections_are_limited(serving: Serving) -> None:
    serving.gate.set()
    channels = [connected(serving) for _ in range(10)]
    opened = [await channel.__aenter__() for channel in channels]
    try:
        results = await asyncio.gather(*(keep(channel, 10, timeout=2) for channel in opened), return_exceptions=True)
        assert sum(isinstance(each, bytes) for each in results) == 8
    finally:
        for channel in channels:
            await channel.__aexit__(None, None, None)
