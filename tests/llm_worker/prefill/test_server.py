"""The Prefill service: its refusals, and the release of everything when a peer disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import torch

from tests.llm_worker.frontend.serving import LocalWorker, identity, serving
from vitrine_vlm.embedding_transport.fleet.row_peer import ConnectOptions
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.errors import BadRequest, PrefillMismatch, PrefillUnavailable, WorkerUnavailable
from vitrine_vlm.llm_worker.engine.config import KvCacheDtype
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.prefill.rpc import SERVICE, prefill_handlers
from vitrine_vlm.llm_worker.prefill.server import PrefillServicer, ServedPrefill, _scope
from vitrine_vlm.llm_worker.prefill.wire import format_to_proto
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tenants import CacheScope, set_tenant
from vitrine_vlm.types import RowsEvent, TransportName


@dataclass
class Running:
    address: str
    stub: prefill_pb2_grpc.PrefillAsyncStub
    calls: RunningCalls
    exporter: RowExporter
    kv_format: KvFormat
    worker: LocalWorker

    def request(self, session_id: str = "", **differs: str) -> prefill_pb2.PrefillRequest:
        return prefill_pb2.PrefillRequest(
            session_id=session_id,
            format=format_to_proto(replace(self.kv_format, **differs)),  # type: ignore[arg-type]
            prompt=llm_pb2.Prompt(text="The quick brown fox"),
            sampling=llm_pb2.SamplingParams(temperature=0.0, max_tokens=8),
        )


@asynccontextmanager
async def running(
    folder: Path, shm_folder: Path, pool_nbytes: int = 1 << 20, kv_cache_dtype: KvCacheDtype = "auto"
) -> AsyncIterator[Running]:
    calls = RunningCalls()
    requests = RequestTracker(LlmMetrics(), calls)
    servicer = PrefillServicer(requests, ByteBudget(1 << 30))
    server = LlmServer(LlmServicer(requests), SERVICE)
    server.grpc.add_generic_rpc_handlers((prefill_handlers(servicer),))
    address = await server.start("127.0.0.1", 0)
    exporter = RowExporter([ShmPool(shm_folder, pool_nbytes)], lease_ttl_s=30.0)
    exporter.start(Supervisor())
    kv_format = KvFormat.of(identity(folder), text_config(open_checkpoint(str(folder))), kv_cache_dtype)
    try:
        async with (
            serving(folder, kv_cache_dtype=kv_cache_dtype) as worker,
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = prefill_pb2_grpc.PrefillStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Describe(prefill_pb2.DescribeRequest())
            assert isinstance(error_from_rpc(caught.value), PrefillUnavailable)
            servicer.open(ServedPrefill(worker.served, kv_format, exporter))
            yield Running(address, stub, calls, exporter, kv_format, worker)
    finally:
        await server.stop(0)
        await exporter.close()


async def session(stub: prefill_pb2_grpc.PrefillAsyncStub, exporter: RowExporter) -> tuple[object, str]:
    call = stub.Connect()
    hello = encoder_pb2.Hello(protocol_version=1, transports=["shm"])
    await call.write(encoder_pb2.ConnectRequest(hello=hello))
    await call.read()
    result = encoder_pb2.ProbeResult(nonce=exporter._pools[0].nonce)
    await call.write(encoder_pb2.ConnectRequest(probe_result=result))
    response = await call.read()
    assert isinstance(response, encoder_pb2.ConnectResponse)
    return call, response.session.session_id


async def test_it_describes_its_format_and_refuses_workers_with_another(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with running(qwen3_vl_folder, tmp_path) as worker:
        described = await worker.stub.Describe(prefill_pb2.DescribeRequest())
        assert described == format_to_proto(worker.kv_format)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in worker.stub.Prefill(worker.request(revision="another"))]
        error = error_from_rpc(caught.value)
        assert isinstance(error, PrefillMismatch)
        assert "'another'" in str(error) and repr(worker.kv_format.revision) in str(error)


async def test_prompts_of_two_tenants_share_no_kv(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with running(qwen3_vl_folder, tmp_path) as worker:

        async def cached_tokens(tenant: str, cache_salt: str = "") -> int:
            request = worker.request()
            request.tenant, request.cache_salt = tenant, cache_salt
            prefilled, _ = [each async for each in worker.stub.Prefill(request)]
            return prefilled.prefilled.num_cached_tokens

        for scope in (("",), ("red",), ("blue",), ("red", "salt")):
            assert await cached_tokens(*scope) == 0
            assert await cached_tokens(*scope) == 16


@pytest.mark.parametrize(("own", "named", "served"), [("", "red", "red"), ("red", "red", "red"), ("red", "blue", None)])
async def test_a_caller_with_a_tenant_of_its_own_names_no_other(own: str, named: str, served: str | None) -> None:
    set_tenant(own)
    request = prefill_pb2.PrefillRequest(tenant=named, cache_salt="salt")
    if served is not None:
        assert _scope(request) == CacheScope(served, "salt")
        return
    with pytest.raises(BadRequest, match="'blue' of this prompt"):
        _scope(request)


async def test_a_generated_client_understands_it(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    """Without a session rows come as bytes, and all of them."""
    async with running(qwen3_vl_folder, tmp_path) as worker:
        events = [each async for each in worker.stub.Prefill(worker.request())]
        assert [each.WhichOneof("event") for each in events] == ["prefilled", "chunk"]
        num_tokens = events[0].prefilled.num_prompt_tokens
        assert sum(len(each.chunk.data) for each in events[1:]) == num_tokens * worker.kv_format.row_nbytes
        await worker.worker.until_idle()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_kv_in_fp8_is_sent_as_it_is(qwen3_vl_folder: Path, tmp_path: Path, transport: TransportName) -> None:
    async with running(qwen3_vl_folder, tmp_path, kv_cache_dtype="fp8") as worker:
        assert (worker.kv_format.dtype, worker.kv_format.row_nbytes) == ("float8_e4m3fn", worker.kv_format.row_width)
        token_ids = list(range(5, 35))
        request = worker.request()
        request.prompt.token_ids.ids.extend(token_ids)
        _, *chunks = [each async for each in worker.stub.Prefill(request)]
        sent = torch.frombuffer(bytearray(b"".join(each.chunk.data for each in chunks)), dtype=torch.uint8)
        client = prefill_client(worker, tmp_path, transport, worker.kv_format)
        try:
            await client.wait_ready(10)
            asked = GenerationRequest("request", token_ids, (), SamplingParams(temperature=0.0, max_tokens=8))
            _, event = [event async for event in client.prefill(asked, token_ids, True)]
            assert isinstance(event, RowsEvent)
            landed = torch.zeros(len(token_ids), worker.kv_format.row_width).to(torch.float8_e4m3fn)
            event.rows.copy_to(landed, None, 0)
            event.rows.release()
            # The second time the first block is in the prefix cache, and the rest is computed by itself.
            assert (landed.view(torch.uint8).flatten() == sent).float().mean() > 0.99
        finally:
            await client.close()


async def test_kv_in_another_dtype_is_refused(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with running(qwen3_vl_folder, tmp_path, kv_cache_dtype="fp8") as worker:
        client = prefill_client(worker, tmp_path, "shm", replace(worker.kv_format, dtype="float32"))
        try:
            with pytest.raises(PrefillMismatch, match=r"'float8_e4m3fn', this worker has 'float32'.*--kv-cache-dtype"):
                await client.start()
        finally:
            await client.close()


def prefill_client(worker: Running, shm_folder: Path, transport: TransportName, kv_format: KvFormat) -> PrefillClient:
    client = PrefillClient(
        kv_format,
        ConnectOptions(transport, shm_folder),
        merge_size=2,
        timeout_s=10,
        max_prompt_tokens=512,
        on_hand_over=lambda seconds: None,
    )
    client.set_addresses([worker.address])
    return client


async def test_rows_that_the_caller_has_are_not_sent(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with running(qwen3_vl_folder, tmp_path) as worker:
        request = worker.request()
        (prefilled, whole) = [each async for each in worker.stub.Prefill(request)]
        request.first_row = 2
        (_, part) = [each async for each in worker.stub.Prefill(request)]
        expected, found = (
            torch.frombuffer(bytearray(each.chunk.data), dtype=torch.float32).view(-1, worker.kv_format.row_width)
            for each in (whole, part)
        )
        torch.testing.assert_close(found, expected[2:], atol=1e-5, rtol=1e-5)
        request.first_row = prefilled.prefilled.num_prompt_tokens
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in worker.stub.Prefill(request)]
        assert isinstance(error_from_rpc(caught.value), BadRequest)
        await worker.worker.until_idle()


async def test_cancelling_at_any_moment_leaves_no_blocks_and_no_lease(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with running(qwen3_vl_folder, tmp_path) as worker:
        connect, session_id = await session(worker.stub, worker.exporter)
        for call_id, delay_s in enumerate((0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.2), 1):
            request = worker.request(session_id)
            request.call_id = call_id
            call = worker.stub.Prefill(request)
            await asyncio.sleep(delay_s)
            call.cancel()
            unread = [encoder_pb2.UnreadCall(call_id=call_id)]
            await worker.stub.Release(encoder_pb2.ReleaseRequest(session_id=session_id, unread_calls=unread))
            await worker.worker.until_idle()
        async with asyncio.timeout(5):
            while worker.exporter.stats().live_leases:
                await asyncio.sleep(0.01)
        del connect


async def test_kv_that_waits_for_the_pool_keeps_its_blocks_and_draining_waits_for_it(
    qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    async with running(qwen3_vl_folder, tmp_path, pool_nbytes=40 << 10) as worker:
        connect, session_id = await session(worker.stub, worker.exporter)
        leases = []
        calls = [worker.stub.Prefill(worker.request(session_id)) for _ in range(4)]
        reading = [asyncio.create_task(_lease(call)) for call in calls]
        done, waiting = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        assert waiting, "the pool is meant to be too small for all"
        assert worker.worker.engine.stats().kv_blocks_used > 0
        worker.calls.refuse(lambda: WorkerUnavailable("the worker is shutting down"))
        draining = asyncio.create_task(worker.calls.idle(10))
        while waiting or done:
            leases = [each.result() for each in done]
            worker.exporter.release(session_id, leases)
            done = set()
            if waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert await asyncio.wait_for(draining, 5)
        assert not worker.exporter.stats().live_leases
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in worker.stub.Prefill(worker.request(session_id))]
        assert isinstance(error_from_rpc(caught.value), PrefillUnavailable)
        await worker.worker.until_idle()
        del connect


async def _lease(call: grpc.aio.UnaryStreamCall[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]) -> int:
    events = [each async for each in call]
    return events[-1].ready.lease.lease_id
