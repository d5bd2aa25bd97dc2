"""Every error keeps its code, message and status on its way over gRPC."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import pytest

from vitrine_vlm.embedding_transport.wire.grpc_status import STATUS_BY_CODE, abort, error_from_rpc, is_peer_gone
from vitrine_vlm.errors import InternalError, MediaNotFound, Overloaded, VitrineError, error_from_code
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc


def all_errors(base: type[VitrineError] = VitrineError) -> list[type[VitrineError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in all_errors(child))]


ERRORS = [error for error in all_errors() if error.__module__ == "vitrine_vlm.errors"]


class Failing(encoder_pb2_grpc.EncoderServicer):
    def __init__(self) -> None:
        self.error: Exception = InternalError("unset")

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        await abort(context, self.error)


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, encoder_pb2_grpc.EncoderAsyncStub]]:
    servicer, server = Failing(), grpc.aio.server()  # type: ignore[abstract]
    encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, encoder_pb2_grpc.EncoderStub(channel)
    await server.stop(None)


def test_the_table_has_a_row_for_every_code_and_no_other() -> None:
    assert set(STATUS_BY_CODE) == {error.code for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
async def test_round_trip(
    failing: tuple[Failing, encoder_pb2_grpc.EncoderAsyncStub], error: type[VitrineError]
) -> None:
    servicer, stub = failing
    servicer.error = error("what was wrong: 42")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Describe(encoder_pb2.DescribeRequest())
    assert caught.value.code() is STATUS_BY_CODE[error.code]
    again = error_from_rpc(caught.value)
    assert again is not None
    assert (again.code, str(again)) == (error.code, "what was wrong: 42")


@pytest.mark.parametrize(("after_s", "says_s"), [(0.0, 1.0), (2.5004, 2.501), (90.0, 90.0)])
async def test_overloaded_has_a_time_after_which_to_retry(
    failing: tuple[Failing, encoder_pb2_grpc.EncoderAsyncStub], after_s: float, says_s: float
) -> None:
    servicer, stub = failing
    servicer.error = Overloaded("full", after_s)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Describe(encoder_pb2.DescribeRequest())
    again = error_from_rpc(caught.value)
    assert isinstance(again, Overloaded)
    assert again.retry_after_s == pytest.approx(says_s)


def test_an_invalid_retry_time_is_ignored() -> None:
    for said in ("-1", "soon", "", "9" * 5000):
        metadata = grpc.aio.Metadata(("vitrine-error-code", "overloaded"), ("grpc-retry-pushback-ms", said))
        error = error_from_rpc(grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata))
        assert isinstance(error, Overloaded)
        assert error.retry_after_s == 0.0


@pytest.mark.parametrize("message", ["x" * 100_000, "é" * 9000, "\0" * 5000, "a lone \udcff", "two\nlines, 100 %"])
async def test_every_message_leaves_room_for_its_code(
    failing: tuple[Failing, encoder_pb2_grpc.EncoderAsyncStub], message: str
) -> None:
    servicer, stub = failing
    servicer.error = MediaNotFound(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Describe(encoder_pb2.DescribeRequest(), timeout=5)
    again = error_from_rpc(caught.value)
    assert isinstance(again, MediaNotFound)
    if len(message) < 100:
        assert str(again) == message.replace("\udcff", "?")
    else:
        assert str(again).endswith("...") and message.startswith(str(again)[:600])


async def test_foreign_exceptions_keep_their_text_to_the_log(
    failing: tuple[Failing, encoder_pb2_grpc.EncoderAsyncStub], caplog: pytest.LogCaptureFixture
) -> None:
    servicer, stub = failing
    servicer.error = RuntimeError("the password is swordfish")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Describe(encoder_pb2.DescribeRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    details = caught.value.details() or ""
    assert "swordfish" not in details
    assert "swordfish" in caplog.text
    assert re.match(r"internal error [0-9a-f]{8}:", details) and details.split(":")[0] in caplog.text


class Outliving(encoder_pb2_grpc.EncoderServicer):
    """Its Connect goes on when it is cancelled, as one does that waits for a thread, and then answers."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    async def Connect(self, requests, context):  # type: ignore[no-untyped-def, override]
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await self.go_on.wait()
            await context.write(encoder_pb2.ConnectResponse())
        except Exception as error:
            self.error = error
            await abort(context, error)
        finally:
            self.ended.set()


async def test_a_call_that_outlives_its_server_is_no_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    servicer, server = Outliving(), grpc.aio.server()  # type: ignore[abstract]
    encoder_pb2_grpc.add_EncoderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = encoder_pb2_grpc.EncoderStub(channel).Connect()
        await call.write(encoder_pb2.ConnectRequest())
        await server.stop(None)
        servicer.go_on.set()
        await asyncio.wait_for(servicer.ended.wait(), 10)
    assert servicer.error is not None and is_peer_gone(servicer.error)
    assert "already stopped" in str(servicer.error)
    assert "internal error" not in caplog.text


async def test_a_lost_connection_is_no_error_of_the_peer() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:9") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await encoder_pb2_grpc.EncoderStub(channel).Describe(encoder_pb2.DescribeRequest())
    assert error_from_rpc(caught.value) is None


def test_unknown_codes_become_internal_errors_that_keep_them() -> None:
    error = error_from_code("from_the_future", "hello")
    assert isinstance(error, InternalError)
    assert "from_the_future" in str(error)
