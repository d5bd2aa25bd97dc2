"""Encode calls on encoders that die, are overloaded or disagree."""

# The encoders here have no method but Encode.
# mypy: disable-error-code="abstract"

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from tests.deploy.ray_serve.choosing import Replicas
from vitrine_vlm.deploy.ray_serve.encode_forwarder import EncodeForwarder
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import encoder_handlers
from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.errors import BadRequest, InternalError, TooManyItems, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc

ROWS = bytes(range(200))
CHUNK = 40


class Encoder(encoder_pb2_grpc.EncoderServicer):
    """Answers every item with ROWS.

    dies_after: chunks, then the call breaks off; refuses: with these codes, one an item, before it takes any.
    """

    def __init__(self, dies_after: int | None = None, refuses: tuple[str, ...] = (), revision: bytes = b"r") -> None:
        self.dies_after = dies_after
        self.refusals = list(refuses)
        self.revision = revision
        self.metadata: dict[str, Any] = {}
        self.tenant = ""
        self.cancelled = asyncio.Event()

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        self.metadata, self.tenant = dict(context.invocation_metadata()), request.tenant
        assert len(request.items) == 1
        if request.items[0].kind == encoder_pb2.MEDIA_KIND_UNSPECIFIED:
            await abort(context, BadRequest("no kind"))
        if self.refusals:
            failed = encoder_pb2.Failed(code=self.refusals.pop(0), message="not now", retry_after_s=2.5)
            yield encoder_pb2.EncodeResponse(failed=failed)
            return
        # Each encoder expects another time.
        layout = encoder_pb2.Layout(grid_thw=[1, 2, 2], num_tokens=1, content_hash=self.revision, queue_s=id(self))
        yield encoder_pb2.EncodeResponse(layout=layout)
        try:
            for number, offset in enumerate(range(0, len(ROWS), CHUNK)):
                if number == self.dies_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                chunk = encoder_pb2.Chunk(offset=offset, data=ROWS[offset : offset + CHUNK])
                yield encoder_pb2.EncodeResponse(chunk=chunk)
                if request.items[0].data == b"slow":
                    await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@contextlib.asynccontextmanager
async def serving(*encoders: Encoder) -> AsyncIterator[list[str]]:
    """Their addresses."""
    async with AsyncExitStack() as stack:
        addresses = []
        for encoder in encoders:
            server = grpc.aio.server()
            server.add_generic_rpc_handlers((encoder_handlers(encoder),))
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield addresses


def request(*contents: bytes) -> encoder_pb2.EncodeRequest:
    items = [encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=each) for each in contents]
    return encoder_pb2.EncodeRequest(request_id="request", items=items)


def forwarder(replicas: Replicas, retry_s: float = 20.0) -> EncodeForwarder:
    return EncodeForwarder(replicas, max_items=3, retry_s=retry_s)  # type: ignore[arg-type]


async def collect(forwarding: EncodeForwarder, asked: encoder_pb2.EncodeRequest) -> list[Any]:
    """Per item its rows, or the code it failed with; each with one layout."""
    found: list[Any] = [b""] * len(asked.items)
    layouts = []
    async for response in forwarding.encode(asked):
        event = response.WhichOneof("event")
        if event == "layout":
            layouts.append(response.layout.item_index)
        elif event == "chunk":
            assert response.chunk.offset == len(found[response.chunk.item_index])
            found[response.chunk.item_index] += response.chunk.data
        else:
            found[response.failed.item_index] = response.failed.code
    assert sorted(layouts) == sorted(set(layouts)), "a layout came twice"
    return found


async def test_items_of_a_request_come_back_under_their_own_index() -> None:
    async with serving(Encoder(), Encoder()) as addresses:
        replicas = Replicas(addresses)
        assert await collect(forwarder(replicas), request(b"a", b"b", b"c")) == [ROWS] * 3
        assert await collect(forwarder(replicas), request(b"a", b"b", b"c")) == [ROWS] * 3
    assert sorted(replicas.chosen[:3]) == sorted(replicas.chosen[3:]), "equal content went elsewhere"
    assert replicas.num_held == 0


@pytest.mark.parametrize("dies_after", [0, 1, 3])
async def test_another_encoder_goes_on_where_a_lost_one_stopped(dies_after: int) -> None:
    async with serving(Encoder(dies_after), Encoder()) as addresses:
        replicas = Replicas(addresses)
        contents = [f"picture {number}".encode() for number in range(32)]
        for content in contents:
            assert await collect(forwarder(replicas), request(content)) == [ROWS]
    assert len(replicas.chosen) > len(contents), "none went to the one that dies"
    assert replicas.num_held == 0


async def test_an_item_waits_for_an_encoder_in_place_of_the_only_one() -> None:
    async with serving(Encoder(dies_after=2)) as dying, serving(Encoder()) as replacement:
        replicas = Replicas(dying)
        asking = asyncio.create_task(collect(forwarder(replicas), request(b"a")))
        while len(replicas.chosen) < 3:
            await asyncio.sleep(0.01)
        replicas.addresses = replacement
        assert await asking == [ROWS]


async def test_an_item_does_not_wait_for_ever() -> None:
    async with serving(Encoder(dies_after=2)) as addresses:
        assert await collect(forwarder(Replicas(addresses), retry_s=0.0), request(b"a")) == ["encoder_unavailable"]


async def test_overload_is_reported_once_all_are_overloaded() -> None:
    overloaded = ("overloaded",) * 10
    async with serving(Encoder(refuses=overloaded), Encoder(refuses=overloaded)) as addresses:
        replicas = Replicas(addresses)
        responses = [each async for each in forwarder(replicas).encode(request(b"a"))]
    assert sorted(replicas.chosen[:2]) == sorted(addresses)
    assert [(each.failed.code, each.failed.retry_after_s) for each in responses] == [("overloaded", 2.5)]
    async with serving(Encoder(refuses=overloaded), Encoder()) as addresses:
        assert await collect(forwarder(Replicas(addresses)), request(b"a", b"b", b"c")) == [ROWS] * 3


async def test_an_item_that_is_at_fault_fails_alone_and_at_once() -> None:
    async with serving(Encoder(refuses=("not_an_image",))) as addresses:
        replicas = Replicas(addresses)
        found = await collect(forwarder(replicas), request(b"a", b"b"))
    assert sorted(found, key=str) == [ROWS, "not_an_image"]
    assert len(replicas.chosen) == 2


async def test_rows_of_two_models_are_never_mixed() -> None:
    async with serving(Encoder(dies_after=2, revision=b"old")) as old, serving(Encoder(revision=b"new")) as new:
        replicas = Replicas(old)
        asking = asyncio.create_task(collect(forwarder(replicas), request(b"a")))
        while len(replicas.chosen) < 2:
            await asyncio.sleep(0.01)
        replicas.addresses = new
        with pytest.raises(InternalError, match="had"):
            await asking


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(), BadRequest),
        (request(b"a", b"b", b"c", b"d"), TooManyItems),
        (encoder_pb2.EncodeRequest(items=[encoder_pb2.MediaItem(data=b"a")]), BadRequest),  # says the encoder
        (encoder_pb2.EncodeRequest(items=request(b"a").items, layout_only=True), TransportUnavailable),
        (encoder_pb2.EncodeRequest(items=[encoder_pb2.MediaItem(ticket=b"")]), TransportUnavailable),
    ],
)
async def test_requests_that_no_encoder_can_serve(asked: encoder_pb2.EncodeRequest, error: type[Exception]) -> None:
    async with serving(Encoder()) as addresses:
        with pytest.raises(error):
            await collect(forwarder(Replicas(addresses)), asked)


async def test_items_are_routed_by_their_content_whatever_their_source() -> None:
    async with serving(Encoder(), Encoder()) as addresses:
        for number in range(6):
            replicas = Replicas(addresses)
            content, kind = b"a%d" % number, encoder_pb2.MEDIA_KIND_IMAGE
            file = encoder_pb2.MediaItem(kind=kind, data=content)
            patches = encoder_pb2.MediaItem(kind=kind, patches=encoder_pb2.Patches(data=content))
            for item in (file, patches):
                assert await collect(forwarder(replicas), encoder_pb2.EncodeRequest(items=[item])) == [ROWS]
            assert len(replicas.chosen) == 2 and len(set(replicas.chosen)) == 1


async def test_cancelling_reaches_the_encoder_and_the_trace_does_too() -> None:
    encoder = Encoder()
    async with serving(encoder) as addresses:
        replicas = Replicas(addresses)
        trace = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
        async with aclosing(forwarder(replicas).encode(request(b"slow"), trace)) as responses:
            async for response in responses:
                if response.WhichOneof("event") == "chunk":
                    break
        await asyncio.wait_for(encoder.cancelled.wait(), 20)
    assert replicas.num_held == 0
    assert encoder.metadata["traceparent"] == trace[0][1]
