"""A whole encoder inside the test's process, and small pictures to send to it."""

from __future__ import annotations

import io
import math
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import torch
from PIL import Image

from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.wire.message_bounds import MessageBounds
from vitrine_vlm.encoder_service.codec import describe_to_proto, stats_to_proto
from vitrine_vlm.encoder_service.decoding.media_decoder import InProcessDecoder
from vitrine_vlm.encoder_service.decoding.work import DecodeWork
from vitrine_vlm.encoder_service.engine.admission import Admission
from vitrine_vlm.encoder_service.engine.batcher import Batcher
from vitrine_vlm.encoder_service.engine.cache import EmbeddingCache
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.families import build_tower, processor_settings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.encoder_service.preprocess.preprocess_pool import Decoders, PreprocessPool
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.encoder_service.server import EncoderServer, EncoderServicer, ServiceState
from vitrine_vlm.encoder_service.service import EncodeService
from vitrine_vlm.encoder_service.tickets import TicketTable
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.grpc_channel import CHANNEL_OPTIONS
from vitrine_vlm.service_runtime.port_limits import PortLimits
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import MediaItem, ModelIdentity

MAX_ITEMS = 8


class GatedTower:
    """A real tower that waits for `gate` before each forward and records the grids of every batch."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower
        self.out_hidden_size = tower.out_hidden_size
        self.deepstack_visual_indexes = tower.deepstack_visual_indexes
        self.row_width = tower.row_width
        self.merge_unit = tower.merge_unit
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[GridTHW]] = []
        self.error: Exception | None = None

    def forward(self, patches_PX: torch.Tensor, grid_thw: list[GridTHW]) -> torch.Tensor:
        self.batches.append(grid_thw)
        self.entered.set()
        assert self.gate.wait(20), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        return self._tower.forward(patches_PX, grid_thw)


@dataclass
class RunningEncoder:
    """Parts of an encoder that serves on `address`; `channel` is connected to it."""

    address: str
    identity: ModelIdentity
    tower: GatedTower
    preprocessor: Preprocessor
    admission: Admission
    service: EncodeService
    exporter: RowExporter
    servicer: EncoderServicer
    server: EncoderServer
    metrics: EncoderMetrics
    calls: RunningCalls
    tickets: TicketTable
    held: ByteBudget
    channel: grpc.aio.Channel = field(repr=False)

    def rows_of(self, data: bytes) -> torch.Tensor:
        """Rows of one image, made without batcher, service and transport."""
        opened = self.preprocessor.open("image", data)
        return self.tower._tower.forward(opened.patches(), [opened.layout.grid_thw])


class InProcessDecoders:
    """Saves the tests that are not about decoding the start of processes."""

    num_processes = 2

    class Decoder(InProcessDecoder):
        def kill(self) -> None:
            """Does nothing: the pictures of these tests take no time."""

    @asynccontextmanager
    async def decoder(self, work: DecodeWork) -> AsyncIterator[Decoder]:
        yield self.Decoder()

    async def close(self) -> None:
        pass


@asynccontextmanager
async def run_encoder(
    folder: Path,
    shm_folder: Path,
    *,
    max_batch_patches: int = 4096,
    max_queued_patches: int = 100_000,
    max_held_bytes: int = 1 << 30,
    client_timeout_s: float = 30.0,
    lease_ttl_s: float = 30.0,
    ticket_ttl_s: float = 30.0,
    compute_ahead: int = 0,
    cache_bytes: int = 0,
    loaded: bool = True,
    allowed_folder: Path | None = None,
    decoders: Decoders | None = None,
    cost: CostModel | None = None,
) -> AsyncIterator[RunningEncoder]:
    checkpoint = open_checkpoint(str(folder))
    limits = MediaLimits(allow_private_addresses=True, timeout_s=20, allowed_folder=allowed_folder)
    tower = GatedTower(build_tower(checkpoint, torch.device("cpu"), torch.float32))
    identity = ModelIdentity(
        checkpoint.model,
        checkpoint.revision,
        str(checkpoint.config["model_type"]),
        tower.out_hidden_size,
        tower.deepstack_visual_indexes,
        "float32",
    )
    metrics, calls, held = EncoderMetrics(), RunningCalls(), ByteBudget(max_held_bytes)
    exporter = RowExporter([ShmPool(shm_folder, 8 << 20)] if shm_folder else [], lease_ttl_s=lease_ttl_s)
    exporter.start(Supervisor())
    cost = cost or CostModel(0.0, 0.0, 0.0)
    admission = Admission(cost, max_patches=max_queued_patches, max_s=math.inf)
    batcher = Batcher(tower, cost, max_batch_patches=max_batch_patches, on_batch=metrics.observe_batch)
    batcher.start(Supervisor())
    loader = MediaLoader(limits)
    preprocessor = Preprocessor(processor_settings(checkpoint), limits)
    cache = EmbeddingCache(gpu_nbytes=0, host_nbytes=cache_bytes)
    cache.start(Supervisor())
    tickets = TicketTable(uuid.uuid4().hex, ticket_ttl_s, max_ahead=compute_ahead)
    tickets.start(Supervisor())
    metrics.watch_tickets(lambda: len(tickets), lambda: tickets.nbytes, lambda: tickets.ahead)
    preprocess_pool = PreprocessPool(preprocessor, decoders or InProcessDecoders(), revision=identity.revision)
    preprocess_pool.start(Supervisor())
    service = EncodeService(
        loader, held, preprocess_pool, admission, batcher, cache, tickets, max_items=MAX_ITEMS, metrics=metrics
    )
    metrics.watch_cache(cache.stats)
    metrics.watch_queue(admission, lambda: held.reserved_nbytes, lambda: batcher.waiting_patches)
    metrics.watch_exporter(exporter.stats)
    servicer = EncoderServicer(metrics, calls, held)
    limits_of_port = PortLimits(client_timeout_s=client_timeout_s)
    bounds = MessageBounds(held, limits_of_port)
    server = EncoderServer(servicer, limits=limits_of_port, interceptors=[bounds])
    address = await server.start("127.0.0.1", 0)
    if loaded:
        description = describe_to_proto(identity, preprocessor.settings, exporter.transports, MAX_ITEMS, tickets)
        stats = lambda: stats_to_proto(admission.seconds, cache.stats(), exporter.stats(), tickets)  # noqa: E731
        servicer.open(ServiceState(description, service, exporter, stats, identity.row_nbytes))
        await server.set_serving(True)
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield RunningEncoder(
            address,
            identity,
            tower,
            preprocessor,
            admission,
            service,
            exporter,
            servicer,
            server,
            metrics,
            calls,
            tickets,
            held,
            channel,
        )
    tower.gate.set()
    await server.stop(0)
    await tickets.close()
    await preprocess_pool.close()
    await cache.close()
    await loader.close()
    await batcher.close()
    await exporter.close()


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A picture of noise; sides that are multiples of a token's side are not resized."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def image(data: bytes) -> MediaItem:
    return MediaItem("image", data=data)


def image_message(data: bytes) -> encoder_pb2.MediaItem:
    return encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=data)
