"""The client's checks of a prefill worker's responses, on a real server with invented ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from tests.embedding_transport.clients.unread import read_up_to
from vitrine_vlm.embedding_transport.fleet.row_peer import ConnectOptions
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.shipping.session_rpc import SessionServicer
from vitrine_vlm.embedding_transport.wire.chunk_codec import encode_chunk
from vitrine_vlm.errors import (
    InternalError,
    PrefillMismatch,
    PrefillUnavailable,
    PromptTooLong,
    TransportUnavailable,
)
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.prefill import client as prefill_client
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.prefill.rpc import prefill_handlers
from vitrine_vlm.llm_worker.prefill.stream import PrefillEvent
from vitrine_vlm.llm_worker.prefill.wire import Prefilled, format_to_proto
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import ItemTimings, MediaItem, MediaOptions, RowsEvent

FORMAT = KvFormat("model", "revision", "qwen3_vl", "float32", num_layers=2, num_key_value_heads=1, head_dim=4)
NUM_TOKENS, MAX_TOKENS = 5, 8
KV = torch.arange(NUM_TOKENS * FORMAT.row_width, dtype=torch.float32).view(NUM_TOKENS, -1)
Answer = prefill_pb2.PrefillResponse | bytes


def prefilled(num_tokens: int = NUM_TOKENS, token_id: int = 3) -> prefill_pb2.PrefillResponse:
    return prefill_pb2.PrefillResponse(prefilled=prefill_pb2.Prefilled(num_prompt_tokens=num_tokens, token_id=token_id))


def ready(nbytes: int = KV.nbytes, offset: int = 4096 + 64) -> prefill_pb2.PrefillResponse:
    lease = encoder_pb2.Lease(lease_id=1, generation=1, offset=offset, nbytes=nbytes)
    return prefill_pb2.PrefillResponse(ready=encoder_pb2.Ready(lease=lease))


def chunk(start: int, stop: int) -> bytes:
    data = memoryview(KV.view(torch.uint8).flatten().numpy())[start:stop]  # type: ignore[arg-type]
    return encode_chunk(0, start, data)


def layout(item_index: int = 0, num_tokens: int = 4) -> prefill_pb2.PrefillResponse:
    message = encoder_pb2.Layout(item_index=item_index, grid_thw=[1, 2, 2 * num_tokens], num_tokens=num_tokens)
    return prefill_pb2.PrefillResponse(layout=message)


class MadeUp(SessionServicer, prefill_pb2_grpc.PrefillServicer):  # type: ignore[misc]
    """Sends `answers`; "export" among them stands for the exporter's responses for the KV."""

    def __init__(self, exporter: RowExporter, kv_format: KvFormat) -> None:
        self.exporter = exporter
        self.kv_format = kv_format
        self.answers: list[Answer | str] = []
        self.requests: list[prefill_pb2.PrefillRequest] = []

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        return format_to_proto(self.kv_format)

    def _exporter(self) -> RowExporter:
        return self.exporter

    async def Prefill(self, request, context):  # type: ignore[no-untyped-def, override]
        self.requests.append(request)
        for answer in self.answers:
            if not isinstance(answer, str):
                await context.write(answer)
                continue
            rows = TensorSource(KV[request.first_row :])
            exported = self.exporter.export(request.session_id, 0, rows, ItemTimings(), call_id=request.call_id)
            async for response in exported:
                message = response if isinstance(response, bytes) else prefill_pb2.PrefillResponse(ready=response.ready)
                await context.write(message)


@contextlib.asynccontextmanager
async def connected(
    folder: Path, transport: str = "shm", theirs: KvFormat = FORMAT
) -> AsyncIterator[tuple[MadeUp, PrefillClient]]:
    exporter = RowExporter([ShmPool(folder, 1 << 16)], lease_ttl_s=30)
    exporter.start(Supervisor())
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    servicer = MadeUp(exporter, theirs)
    server.add_generic_rpc_handlers((prefill_handlers(servicer),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    client = PrefillClient(
        FORMAT,
        ConnectOptions(transport, folder),  # type: ignore[arg-type]
        merge_size=2,
        timeout_s=10,
        max_prompt_tokens=MAX_TOKENS,
        on_hand_over=lambda seconds: None,
    )
    client.set_addresses([address])
    try:
        yield servicer, client
    finally:
        await client.close()
        await server.stop(None)
        await exporter.close()


def request(**sampling: object) -> GenerationRequest:
    params = replace(SamplingParams(temperature=0.5, seed=-1, stop_token_ids=frozenset([9])), **sampling)  # type: ignore[arg-type]
    return GenerationRequest("request", [1, 2], (MediaItem("image", data=b"x", options=MediaOptions(fps=2.0)),), params)


async def ask(
    client: PrefillClient, asked: GenerationRequest | None = None, token: bool = True, first_row: int = 0
) -> list[PrefillEvent]:
    await client.wait_ready(10)
    return [event async for event in client.prefill(asked or request(), [1, 2, 3], token, first_row)]


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_rows_come_as_they_were_sent(tmp_path: Path, transport: str) -> None:
    async with connected(tmp_path, transport) as (worker, client):
        worker.answers = [layout(), prefilled(), "export"]
        events = await ask(client)
        rows = events[2].rows if isinstance(events[2], RowsEvent) else None
        assert rows is not None and isinstance(events[1], Prefilled)
        assert (events[1].num_prompt_tokens, events[1].first.token_id) == (NUM_TOKENS, 3)
        landed = torch.zeros(NUM_TOKENS - 2, FORMAT.row_width)
        rows.copy_to(landed, None, 2)
        assert torch.equal(landed, KV[2:])
        rows.release()
        async with asyncio.timeout(5):
            while worker.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        assert client.stats().received_nbytes[transport] == KV.nbytes
        (sent,) = worker.requests
        assert (list(sent.prompt.token_ids.ids), sent.prompt.media[0].data) == ([1, 2, 3], b"x")
        assert (sent.sampling.temperature, sent.sampling.seed) == (0.5, 2**64 - 1)
        assert (list(sent.sampling.stop_token_ids), sent.sampling.ignore_eos) == ([9], True)


async def test_kv_whose_ready_crosses_the_cancellation_is_released_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_prefilled(raw: bytes) -> bool:
        return prefill_pb2.PrefillResponse.FromString(raw).HasField("prefilled")

    read_up_to(is_prefilled, monkeypatch, prefill_client, "prefill_method")
    async with connected(tmp_path) as (worker, client):
        worker.answers = [prefilled(), "export"]
        await client.wait_ready(10)
        events = client.prefill(request(), [1, 2, 3], True)
        assert isinstance(await anext(events), Prefilled)
        await until_leases(worker, 1)
        await asyncio.sleep(0.05)  # the worker ends the call
        await events.aclose()
        await until_leases(worker, 0)
        assert worker.exporter.stats().leases.released == 1


async def until_leases(worker: MadeUp, number: int) -> None:
    async with asyncio.timeout(5):
        while worker.exporter.stats().live_leases != number:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_rows_that_the_client_has_are_not_sent(tmp_path: Path, transport: str) -> None:
    async with connected(tmp_path, transport) as (worker, client):
        worker.answers = [prefilled(), "export"]
        rows = [event.rows for event in await ask(client, first_row=3) if isinstance(event, RowsEvent)]
        landed = torch.zeros(NUM_TOKENS - 3, FORMAT.row_width)
        rows[0].copy_to(landed, None, 0)
        assert torch.equal(landed, KV[3:])
        rows[0].release()
        assert client.stats().received_nbytes[transport] == KV[3:].nbytes
        worker.answers = [prefilled(3)]
        with pytest.raises(InternalError, match="from row 3 on"):
            await ask(client, first_row=3)


async def test_the_prefill_worker_gets_the_scope_of_the_request(tmp_path: Path) -> None:
    async with connected(tmp_path) as (worker, client):
        worker.answers = [prefilled(token_id=9)]
        await ask(client, replace(request(), scope=CacheScope("red", "salt")))
        assert (worker.requests[0].tenant, worker.requests[0].cache_salt) == ("red", "salt")


async def test_numbers_that_protobuf_cannot_hold_mean_what_they_mean_on_one_worker(tmp_path: Path) -> None:
    """JSON has no limits: no token has such an id, and no context or vocabulary is that large."""
    async with connected(tmp_path) as (worker, client):
        worker.answers = [prefilled(), "export"]
        huge = request(max_tokens=10**30, top_k=2**40, stop_token_ids=frozenset([-1, 9, 2**32]))
        assert [type(event) for event in await ask(client, huge)] == [Prefilled, RowsEvent]
        (sent,) = worker.requests
        assert (sent.sampling.max_tokens, sent.sampling.top_k) == (2**32 - 1, 2**32 - 1)
        assert list(sent.sampling.stop_token_ids) == [9]


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([prefilled(0)], InternalError),
        ([prefilled(MAX_TOKENS + 1)], InternalError),
        ([prefilled(2**32 - 1), chunk(0, 16)], InternalError),
        ([chunk(0, KV.nbytes)], InternalError),
        ([ready()], InternalError),
        ([prefilled(), prefilled()], InternalError),
        ([prefilled(), ready(KV.nbytes - 4)], InternalError),
        ([prefilled(4), ready()], InternalError),
        ([prefilled(), ready(offset=0)], TransportUnavailable),
        ([prefilled(), ready(offset=1 << 40)], TransportUnavailable),
        ([prefilled(), chunk(16, 32)], InternalError),
        ([prefilled(), chunk(0, 16), chunk(0, 16)], InternalError),
        ([prefilled(4), chunk(0, KV.nbytes)], InternalError),
        ([layout(1)], InternalError),
        ([layout(0, MAX_TOKENS + 1)], PromptTooLong),
        ([prefill_pb2.PrefillResponse()], InternalError),
        ([b"\x1a\xff"], InternalError),
        ([], PrefillUnavailable),
        ([layout(), prefilled()], PrefillUnavailable),
        ([prefilled(), chunk(0, 16)], PrefillUnavailable),
    ],
)
async def test_what_does_not_fit_is_refused(
    tmp_path: Path, answers: list[Answer | str], error: type[Exception]
) -> None:
    async with connected(tmp_path) as (worker, client):
        worker.answers = answers
        with pytest.raises(error):
            await ask(client)


async def test_a_first_token_that_is_the_last_comes_alone(tmp_path: Path) -> None:
    async with connected(tmp_path) as (worker, client):
        worker.answers = [prefilled(token_id=9)]
        assert [type(event) for event in await ask(client)] == [Prefilled]
        worker.answers = [prefilled()]
        assert [type(event) for event in await ask(client, request(max_tokens=1))] == [Prefilled]
        # Where only KV is missing, no token may end it.
        worker.answers = [prefilled(token_id=9), "export"]
        (event,) = await ask(client, token=False)
        assert isinstance(event, RowsEvent)
        assert not worker.requests[-1].sampling.stop_token_ids


@pytest.mark.parametrize(
    "differs",
    [
        lambda ours: replace(ours, revision="other"),
        lambda ours: replace(ours, dtype="bfloat16"),
        lambda ours: replace(ours, dtype="float8_e4m3fn"),
        lambda ours: replace(ours, num_layers=3),
        lambda ours: replace(ours, num_key_value_heads=2),
        lambda ours: replace(ours, head_dim=8),
        lambda ours: replace(ours, protocol_version=1),
    ],
)
async def test_other_rows_are_refused_before_anything_is_sent(
    tmp_path: Path, differs: Callable[[KvFormat], KvFormat]
) -> None:
    theirs = differs(FORMAT)
    async with connected(tmp_path, theirs=theirs) as (worker, client):
        with pytest.raises(PrefillMismatch) as caught:
            await client.start()
        (field,) = [name for name in vars(FORMAT) if getattr(theirs, name) != getattr(FORMAT, name)]
        for part in (field, repr(getattr(theirs, field)), repr(getattr(FORMAT, field))):
            assert part in str(caught.value)
        with pytest.raises(PrefillUnavailable, match=field):
            [event async for event in client.prefill(request(), [1], True)]
        assert not worker.requests
