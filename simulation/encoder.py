"""One encoder: the product's service, admission, batcher, cost model, cache and leases, over a simulated tower."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderDescription
from vitrine_vlm.embedding_transport.pools.lease_manager import LeaseManager, PoolBlock
from vitrine_vlm.embedding_transport.wire.messages import layout_to_proto, timings_to_proto
from vitrine_vlm.encoder_service.codec import failed_to_proto, item_from_proto
from vitrine_vlm.encoder_service.engine.admission import Admission
from vitrine_vlm.encoder_service.engine.batch import PostForwardHook
from vitrine_vlm.encoder_service.engine.batcher import Batcher
from vitrine_vlm.encoder_service.engine.cache import EmbeddingCache
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.service import EncodeService
from vitrine_vlm.encoder_service.tickets import TicketTable
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.simulation.costs import IDENTITY, MEASURED, MERGE_SIZE, GpuCosts
from vitrine_vlm.simulation.network import Port
from vitrine_vlm.simulation.tower import (
    SimulatedLoader,
    SimulatedMapping,
    SimulatedPool,
    SimulatedPreprocessing,
    SimulatedTower,
)
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.types import PROTOCOL_MINOR_VERSION, ItemTimings, Layout

if TYPE_CHECKING:
    from vitrine_vlm.simulation.connection import SimulatedCall, SimulatedConnection

# What a process was started from: a broken one serves, and every batch of it fails.
Version: TypeAlias = Literal["good", "broken", "another checkpoint"]


@dataclass(frozen=True)
class EncoderLimits:
    """The options of an encoder that the simulation knows; the defaults are the product's."""

    max_batch_patches: int = 45056
    max_queued_patches: int = 524_288
    max_queued_s: float = 30.0
    max_held_nbytes: int = 2 << 30
    cache_nbytes: int = 2560 << 20
    pool_nbytes: int = 1 << 30
    lease_ttl_s: float = 60.0
    ticket_ttl_s: float = 60.0
    max_items: int = 64


class SimulatedEncoder:
    """One process of an encoder, from its start to its end; after an end a new one is made.

    contents: distinct content hashes of the items that came. longest_queue_s: the longest that an item waited for its
    batch.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        address: str,
        zone: int,
        limits: EncoderLimits,
        seed: int,
        costs: GpuCosts = MEASURED,
        version: Version = "good",
    ) -> None:
        self.address, self.zone = address, zone
        identity = replace(IDENTITY, revision="another") if version == "another checkpoint" else IDENTITY
        rng = random.Random(f"{seed} {address}")
        self.port = Port(rng)
        self.tower = SimulatedTower(loop, rng, costs.real_tower_cost(), is_broken=version == "broken")
        self.contents: set[bytes] = set()
        self.longest_queue_s = 0.0
        self._loop = loop
        self._supervisor = Supervisor()
        cost, clock = costs.tower_cost(), loop.time
        self.held = ByteBudget(limits.max_held_nbytes, clock=clock)
        self.admission = Admission(cost, max_patches=limits.max_queued_patches, max_s=limits.max_queued_s, clock=clock)
        self.cache = EmbeddingCache(gpu_nbytes=0, host_nbytes=limits.cache_nbytes)
        self.pool = SimulatedPool(limits.pool_nbytes)
        # Of all its connections.
        self.mapping = SimulatedMapping(self.pool.mapped_nbytes)
        self.description = EncoderDescription(
            identity, MERGE_SIZE, PROTOCOL_MINOR_VERSION, address, limits.ticket_ttl_s
        )
        self.leases = LeaseManager([self.pool], limits.lease_ttl_s, clock)
        self._tickets = TicketTable(address, limits.ticket_ttl_s, clock)
        batcher = Batcher(self.tower, cost, max_batch_patches=limits.max_batch_patches, clock=clock)
        self.service = EncodeService(
            SimulatedLoader(),
            self.held,
            SimulatedPreprocessing(loop),
            self.admission,
            batcher,
            self.cache,
            self._tickets,
            max_items=limits.max_items,
            metrics=_METRICS,
            clock=clock,
        )
        for part in (batcher, self.cache, self.leases):
            part.start(self._supervisor)

    async def serve(self, call: SimulatedCall, message: bytes, timeout_s: float) -> None:
        """Answers one Encode call, as the product's servicer does."""
        deadline = self._loop.time() + timeout_s
        try:
            request = encoder_pb2.EncodeRequest.FromString(message)
            items = [item_from_proto(index, item) for index, item in enumerate(request.items)]
            with _Replies(self, call, request.call_id) as replies:
                await self.service.encode(items, replies, request.tenant, deadline)
        except VitrineError as error:
            call.fail(error)
        else:
            call.end()

    def open_session(self, connection: SimulatedConnection) -> None:
        self.leases.open_session(self.pool, connection.holder)

    def close_session(self, connection: SimulatedConnection) -> None:
        """The connection has ended: its leases are released."""
        self.leases.release_session(connection.holder.session_id)
        self.leases.close_session(self.pool, connection.holder)

    async def close(self) -> None:
        await self._supervisor.close()

    def left_behind(self) -> list[str]:
        """What is not back at zero; nothing, where no call is in flight."""
        found = {
            "patches": self.admission.num_patches,
            "seconds of the tower": self.admission.tower_s,
            "seconds of preprocessing": self.admission.preprocess_s,
            "bytes of media": self.held.reserved_nbytes,
            "leases": len(self.leases.leases),
            "bytes of the pool": self.pool.used_nbytes,
        }
        left = [f"encoder {self.address} still has {value} {name}" for name, value in found.items() if value]
        failure = self._supervisor.failure
        return left if failure is None else [*left, f"encoder {self.address}: {failure}"]


class _Replies:
    """The answers of one call; leases of which its peer does not learn are released, as in the product's servicer."""

    def __init__(self, encoder: SimulatedEncoder, call: SimulatedCall, call_id: int) -> None:
        self._encoder, self._call, self._call_id = encoder, call, call_id
        self._leases: list[int] = []

    def __enter__(self) -> _Replies:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError) and self._leases:
            self._encoder.leases.release(self._call.connection.holder.session_id, self._leases)

    async def layout(self, item_index: int, layout: Layout) -> None:
        self._encoder.contents.add(layout.content_hash)
        self._call.send(encoder_pb2.EncodeResponse(layout=layout_to_proto(item_index, layout)))

    def shipment(self, item_index: int) -> _Shipment:
        return _Shipment(self, item_index)

    async def failed(self, item_index: int, error: VitrineError) -> None:
        self._call.send(failed_to_proto(item_index, error))

    async def ship(self, item_index: int, nbytes: int, timings: ItemTimings) -> None:
        encoder, call = self._encoder, self._call
        encoder.longest_queue_s = max(encoder.longest_queue_s, timings.queue_ms / 1e3)
        allocated = await encoder.leases.allocate(encoder.pool, nbytes, call.connection.holder)
        assert allocated is not None
        encoder.leases.grant(call.connection.holder.session_id, allocated, self._call_id)
        self._leases.append(allocated.lease_id)
        await call.send_rows(_ready(item_index, allocated, timings), nbytes)


class _Shipment:
    """Ships one item's rows; nothing is queued behind a forward that has no GPU."""

    def __init__(self, replies: _Replies, item_index: int) -> None:
        self.hook: PostForwardHook = _NO_HOOK
        self._replies, self._item_index = replies, item_index

    def __enter__(self) -> _Shipment:
        return self

    def __exit__(self, *exception: object) -> None:
        """Does nothing: rows that were not sent are in no pool."""

    async def send(self, rows_TW: torch.Tensor, timings: ItemTimings) -> None:
        await self._replies.ship(self._item_index, rows_TW.nbytes, timings)


class _NoHook:
    def enqueue(self, rows_TW: torch.Tensor) -> None:
        """Does nothing: rows have no content."""

    def batch_ended(self) -> None:
        """Does nothing, see `enqueue`."""


_NO_HOOK = _NoHook()
# Of all simulated encoders: a registry each would take more memory than the rest of an encoder.
_METRICS = EncoderMetrics()


def _ready(item_index: int, allocated: PoolBlock, timings: ItemTimings) -> encoder_pb2.EncodeResponse:
    block = allocated.block
    lease = encoder_pb2.Lease(
        lease_id=allocated.lease_id, offset=block.offset, nbytes=block.nbytes, generation=block.generation
    )
    ready = encoder_pb2.Ready(item_index=item_index, lease=lease, timings=timings_to_proto(timings))
    return encoder_pb2.EncodeResponse(ready=ready)
