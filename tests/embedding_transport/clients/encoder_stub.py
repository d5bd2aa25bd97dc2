"""A real gRPC server around RowExporter: everything of an encoder but the tower; its rows are synthetic."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import encoder_handlers
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.wire.grpc_status import abort
from vitrine_vlm.embedding_transport.wire.messages import describe
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.peers import peer_of
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import ItemTimings, ModelIdentity

MERGE_SIZE = 2
IDENTITY = ModelIdentity("model", "revision", "qwen3_vl", 8, (1, 2, 3), "float32")


def synthetic_rows(data: bytes, num_tokens: int, identity: ModelIdentity) -> torch.Tensor:
    """Rows that depend on nothing but `data`, [num_tokens, row_width]."""
    seed = int.from_bytes(hashlib.sha256(data).digest()[:4], "little")
    rows = torch.randn(num_tokens, identity.row_width, generator=torch.Generator().manual_seed(seed))
    return rows.to(DTYPES[identity.dtype])


class StubServicer(encoder_pb2_grpc.EncoderServicer):
    """Item data "N..." becomes N tokens; "hang..." stops after its layout until `go_on` is set.

    num_running: Encode calls that have not ended here. tenants: of all Encode calls. queue_s, encode_s: seconds that it
    announces with each layout, and takes.
    """

    def __init__(self, exporter: RowExporter, identity: ModelIdentity) -> None:
        self.exporter = exporter
        self.identity = identity
        self.go_on = asyncio.Event()
        self.num_encodes = 0
        self.num_running = 0
        self.num_items = 0
        self.tenants: list[str] = []
        self.hangs = False
        self.queue_s = self.encode_s = 0.0

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        identity = self.identity
        return describe(
            identity,
            processor=encoder_pb2.ProcessorSettings(merge_size=MERGE_SIZE),
            transports=self.exporter.transports,
        )

    async def Connect(self, request_iterator, context):  # type: ignore[no-untyped-def]
        try:
            async for response in self.exporter.connect(request_iterator, peer_of(context)):
                yield response
        except Exception as error:
            await abort(context, error)

    async def Encode(self, request, context):  # type: ignore[no-untyped-def]
        self.num_encodes += 1
        self.num_running += 1
        self.num_items += len(request.items)
        self.tenants.append(request.tenant)
        self.hangs = any(item.data.startswith(b"hang") for item in request.items)
        try:
            for index, item in enumerate(request.items):
                if item.data.startswith(b"bad"):
                    failed = encoder_pb2.Failed(item_index=index, code="not_an_image", message="no image: bad")
                    yield encoder_pb2.EncodeResponse(failed=failed)
                    continue
                num_tokens = int(item.data.split()[-1])
                layout = encoder_pb2.Layout(
                    item_index=index,
                    grid_thw=[1, 2, 2 * num_tokens],
                    num_tokens=num_tokens,
                    content_hash=hashlib.sha256(item.data).digest(),
                    queue_s=self.queue_s,
                    encode_s=self.encode_s,
                )
                yield encoder_pb2.EncodeResponse(layout=layout)
                await asyncio.sleep(self.queue_s + self.encode_s)
                if item.data.startswith(b"hang"):
                    await self.go_on.wait()
                rows = TensorSource(synthetic_rows(item.data, num_tokens, self.identity))
                async for response in self.exporter.export(request.session_id, index, rows, ItemTimings(forward_ms=5)):
                    yield response
        except Exception as error:
            await abort(context, error)
        finally:
            self.num_running -= 1

    async def Release(self, request, context):  # type: ignore[no-untyped-def]
        released, unknown = self.exporter.release(request.session_id, request.lease_ids)
        return encoder_pb2.ReleaseResponse(num_released=released, num_unknown=unknown)


@contextlib.asynccontextmanager
async def running_stub(
    shm_folder: Path | None,
    identity: ModelIdentity = IDENTITY,
    pool_bytes: int = 1 << 20,
    lease_ttl_s: float = 30.0,
    port: int = 0,
    servicer_class: type[StubServicer] | None = None,
) -> AsyncIterator[tuple[str, StubServicer, grpc.aio.Server]]:
    exporter = RowExporter([ShmPool(shm_folder, pool_bytes)] if shm_folder else [], lease_ttl_s=lease_ttl_s)
    exporter.start(Supervisor())
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    servicer = (servicer_class or StubServicer)(exporter, identity)
    server.add_generic_rpc_handlers((encoder_handlers(servicer),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer, server
    finally:
        await server.stop(None)
        await exporter.close()
