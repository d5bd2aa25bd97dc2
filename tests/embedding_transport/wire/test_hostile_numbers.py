"""Sizes, times and numbers that a peer sends and that cannot be."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest
import torch

from tests.fuzz.targets import Memory
from vitrine_vlm.embedding_transport.pools.pool import HEADER_NBYTES, PAGE_NBYTES, PROBE_NBYTES
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.shipping.session_rpc import check_release
from vitrine_vlm.embedding_transport.wire.messages import describe_identity, layout_from_proto, timings_from_proto
from vitrine_vlm.errors import BadRequest, InternalError, Overloaded, TransportUnavailable, error_from_code
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.peers import Peer
from vitrine_vlm.types import PROTOCOL_VERSION, ItemTimings, MediaItem

NO_TIMES = [math.nan, math.inf, -math.inf, -1.0]


@pytest.mark.parametrize("value", [*NO_TIMES, 1e300])
def test_what_is_no_time_counts_as_unknown(value: float) -> None:
    error = error_from_code("overloaded", "full", value)
    assert isinstance(error, Overloaded) and error.retry_after_s == 0.0
    assert timings_from_proto(encoder_pb2.ItemTimings(load_ms=value, queue_ms=2.0), 1.0).load_ms == 0.0


@pytest.mark.parametrize("value", NO_TIMES)
def test_a_layout_with_times_that_are_none_is_refused(value: float) -> None:
    video = MediaItem("video", data=b"")
    for times in ({"timestamps_s": [value]}, {"timestamps_s": [0.0], "second_per_grid_t": value}):
        with pytest.raises(InternalError, match="times"):
            layout_from_proto(encoder_pb2.Layout(grid_thw=[1, 2, 2], num_tokens=1, **times), video, 2)


@pytest.mark.parametrize("value", [*NO_TIMES, 1e300])
@pytest.mark.parametrize("name", ["queue_s", "encode_s"])
def test_what_is_no_time_moves_no_item(name: str, value: float) -> None:
    layout = encoder_pb2.Layout(grid_thw=[1, 2, 2], num_tokens=1, queue_s=1.0, encode_s=1.0)
    setattr(layout, name, value)
    assert layout_from_proto(layout, MediaItem("image", data=b""), 2).expected is None


def test_a_content_hash_has_a_length() -> None:
    layout = encoder_pb2.Layout(grid_thw=[1, 2, 2], num_tokens=1, content_hash=bytes(1 << 20))
    with pytest.raises(InternalError, match="content hash of 1048576 bytes"):
        layout_from_proto(layout, MediaItem("image", data=b""), 2)


@pytest.mark.parametrize(("width", "num_layers"), [(0, 0), (0, 3), (2**32 - 1, 0), (2048, 100_000)])
def test_rows_without_width_or_an_absurd_one_are_refused(width: int, num_layers: int) -> None:
    description = encoder_pb2.DescribeResponse(
        dtype="float32", out_hidden_size=width, deepstack_visual_indexes=range(num_layers)
    )
    with pytest.raises(InternalError, match="elements"):
        describe_identity(description)


def test_no_rows_lie_nowhere() -> None:
    for shape in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(TransportUnavailable):
            Memory().rows(PAGE_NBYTES + HEADER_NBYTES, shape, torch.float32)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 0), (0, PROBE_NBYTES + 1), (PAGE_NBYTES, 1), (PAGE_NBYTES - 1, 2), (2**64 - 1, 1), (0, 2**32 - 1)],
)
def test_a_probe_reads_the_probe_page_alone(offset: int, nbytes: int) -> None:
    """A peer may name the pool of another one: what lies in it is not sent to that peer."""
    with pytest.raises(TransportUnavailable):
        Memory().read_probe(offset, nbytes)
    assert len(Memory().read_probe(0, PROBE_NBYTES)) == PROBE_NBYTES


async def test_an_item_without_rows_is_no_lease() -> None:
    exporter = RowExporter([], lease_ttl_s=1.0)
    with pytest.raises(InternalError, match="no rows"):
        await anext(exporter.export("", 0, TensorSource(torch.zeros(0, 8)), ItemTimings()))


def test_a_release_is_as_long_as_leases_can_be() -> None:
    check_release(encoder_pb2.ReleaseRequest(lease_ids=range(1000), tickets=[b"t"]))
    with pytest.raises(BadRequest, match="at most"):
        check_release(encoder_pb2.ReleaseRequest(lease_ids=range(100_001)))
    unread = encoder_pb2.UnreadCall(call_id=1, read_lease_ids=range(50_000))
    check_release(encoder_pb2.ReleaseRequest(unread_calls=[unread]))
    for calls in ([unread] * 2, [encoder_pb2.UnreadCall()] * 100_001):
        with pytest.raises(BadRequest, match="at most"):
            check_release(encoder_pb2.ReleaseRequest(unread_calls=calls))


async def test_a_hello_names_a_few_transports() -> None:
    async def hello() -> AsyncIterator[encoder_pb2.ConnectRequest]:
        message = encoder_pb2.Hello(protocol_version=PROTOCOL_VERSION, transports=["x" * 100] * 17)
        yield encoder_pb2.ConnectRequest(hello=message)

    with pytest.raises(BadRequest, match="17 transports"):
        await anext(aiter(RowExporter([], lease_ttl_s=1.0).connect(hello(), Peer("127.0.0.1"))))
