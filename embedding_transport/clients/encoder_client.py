"""The client of an encoder fleet: chooses an encoder for each item, receives the rows, retries on another encoder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from pathlib import Path

import grpc
import torch

from vitrine_vlm.embedding_transport.clients.encode_method import encode_method
from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderDescription, EncoderPeer
from vitrine_vlm.embedding_transport.clients.fleet_client import Exchange, FleetClient
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection, ConnectOptions, TransportChoice
from vitrine_vlm.embedding_transport.receiving.event_stream import EventStream
from vitrine_vlm.embedding_transport.receiving.received_rows import HostBufferPool
from vitrine_vlm.embedding_transport.receiving.row_stream import RowStream
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView, parse_response
from vitrine_vlm.embedding_transport.wire.messages import item_to_proto, layout_from_proto
from vitrine_vlm.errors import EncoderUnavailable, InternalError, Overloaded, VitrineError, error_from_code
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.retry import Attempts, RetryPolicy
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ClientTls
from vitrine_vlm.types import (
    EncodeEvent,
    Layout,
    LayoutEvent,
    MediaItem,
    ModelIdentity,
    RowsEvent,
)

# The encoder cannot be reached, shuts down or has no capacity. All other errors are about the item itself.
ENCODE_RETRIES = RetryPolicy[VitrineError](elsewhere=(EncoderUnavailable, Overloaded))


class EncoderClient(FleetClient[EncoderPeer]):
    """Encodes media on one of several encoders. Create and use it on one event loop.

    Args:
        addresses: "host:port" of every encoder; empty if `set_addresses` provides them.
        expected: the model that the encoders must serve; None accepts any.
        transport: "auto", or the only transport to accept.
        shm_folder: the shared-memory folder, the same as the encoders'.
        connect_timeout_s: seconds for Describe and for the negotiation, each.
        encode_timeout_s: seconds for one request on one encoder.
        gpu: the GPU on which rows are landed; with one, "auto" tries CUDA IPC first.
        tls: for connections to encoders; None for no TLS.
        supervisor: owns the loops of this client; by default a new one. Once a loop has failed, `encode` fails.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        expected: ModelIdentity | None,
        *,
        transport: TransportChoice = "auto",
        shm_folder: Path = Path("/dev/shm"),
        connect_timeout_s: float = 5.0,
        encode_timeout_s: float = 300.0,
        gpu: torch.device | None = None,
        tls: ClientTls | None = None,
        supervisor: Supervisor | None = None,
    ) -> None:
        options = ConnectOptions(transport, shm_folder, connect_timeout_s, gpu, tls)
        super().__init__(
            addresses,
            lambda address: EncoderPeer(address, options, expected),
            ENCODE_RETRIES,
            encode_timeout_s,
            supervisor,
        )

    async def encoder_stats(self, timeout_s: float = 1.0) -> dict[str, encoder_pb2.GetStatsResponse]:
        """Returns each encoder's statistics by address, without encoders that do not answer in time."""

        async def get_stats(connection: Connection[EncoderDescription]) -> encoder_pb2.GetStatsResponse | None:
            try:
                stub = encoder_pb2_grpc.EncoderStub(connection.channel)
                return await stub.GetStats(encoder_pb2.GetStatsRequest(), timeout=timeout_s)
            except (grpc.aio.AioRpcError, grpc.aio.UsageError):  # UsageError: the channel is closed already
                return None
            except asyncio.CancelledError:
                if is_own_cancellation():
                    raise
                return None  # the connection was closed meanwhile

        connected = {peer.address: peer.connection for peer in self._peers if peer.connection is not None}
        answers = await asyncio.gather(*map(get_stats, connected.values()))
        return {address: answer for address, answer in zip(connected, answers, strict=True) if answer is not None}

    def encode(self, items: Sequence[MediaItem], request_id: str, tenant: str = "") -> AsyncGenerator[EncodeEvent]:
        """Encodes the items of one request; yields a LayoutEvent and a RowsEvent for each, as they arrive.

        The caller owns the rows that were yielded. All others are released when the iteration ends or is closed.
        Items go to encoders one by one, by their content. If an encoder dies or is overloaded, the missing items are
        encoded on another one.

        Args:
            tenant: encoders reuse cached rows within one tenant only.

        Raises:
            EncoderUnavailable: no encoder is left.
            Overloaded: all encoders that are left are overloaded.
            VitrineError: the error of the first item that failed.
        """
        self._num_requests += 1
        request = _Request(items, request_id, tenant, self._policy)
        return request.events.read(partial(self._encode_all, request))

    async def _encode_all(self, request: _Request) -> None:
        if len(self._peers) > 1:  # with one encoder there is nothing to choose
            # In a thread: hashing a long video takes a while.
            request.keys = await asyncio.to_thread(lambda: [item.content_key for item in request.items])
        await self._encode(request, range(len(request.items)))

    async def _encode(self, request: _Request, indices: Sequence[int]) -> None:
        """Chooses an encoder for each of these items and starts one call per encoder.

        Raises:
            EncoderUnavailable, Overloaded: no encoder is left.
        """
        usable = await self._usable(request.attempts)
        shares: dict[str, _Share] = {}
        # The largest items are assigned first; the size of an item at a URL is unknown.
        for index in sorted(indices, key=lambda index: -len(request.items[index].data or b"")):
            peer = self._choose(request.keys[index], usable)
            shares.setdefault(peer.address, _Share(peer)).add(index)
        for share in shares.values():
            request.events.start(partial(self._encode_share, request, share), share.release)

    async def _encode_share(self, request: _Request, share: _Share) -> None:
        """Encodes a share on its encoder; if that is lost or overloaded, the missing items are encoded on others."""
        try:
            await self._receive(share.peer, partial(self._exchange, request, share), partial(request.emit, share))
        except request.attempts.elsewhere as error:
            request.attempts.failed(share.peer.address, error)
        missing = sorted(share.pending)
        share.release()
        if missing:
            await self._encode(request, missing)

    def _exchange(
        self, request: _Request, share: _Share, connection: Connection[EncoderDescription]
    ) -> Exchange[EncodeEvent]:
        items = {index: request.items[index] for index in sorted(share.pending)}
        message = encoder_pb2.EncodeRequest(
            request_id=request.request_id,
            session_id=connection.session_id,
            tenant=request.tenant,
            items=map(item_to_proto, items.values()),
        )
        return encode_method(connection.channel), message, _EncodeStream(share.peer, connection, items, self._buffers)

    def _unavailable(self, failures: Mapping[str, VitrineError]) -> EncoderUnavailable:
        reasons = self._reasons(failures)
        return EncoderUnavailable(f"no encoder is left to encode on: {reasons}; start one, or wait until one is ready")


class _Share:
    """The items of a request that go to one encoder. `pending` are those without rows yet; they count as in flight."""

    def __init__(self, peer: EncoderPeer) -> None:
        self.peer = peer
        self.pending: set[int] = set()

    def add(self, index: int) -> None:
        self.pending.add(index)
        self.peer.in_flight += 1

    def remove(self, index: int) -> None:
        self.pending.remove(index)
        self.peer.in_flight -= 1

    def release(self) -> None:
        """The call has ended: the pending items are no longer in flight on this encoder."""
        self.peer.in_flight -= len(self.pending)
        self.pending.clear()


class _Request:
    """One call of `encode`. `keys` are the content keys of the items, by which they are routed."""

    def __init__(
        self, items: Sequence[MediaItem], request_id: str, tenant: str, policy: RetryPolicy[VitrineError]
    ) -> None:
        self.items = items
        self.keys = [b""] * len(items)
        self.request_id = request_id
        self.tenant = tenant
        self.attempts = Attempts(policy)
        self.events: EventStream[EncodeEvent] = EventStream(_release)
        self._layouts: dict[int, Layout] = {}

    async def emit(self, share: _Share, event: EncodeEvent) -> None:
        """Passes an event of a share on to the caller.

        Raises:
            InternalError: another encoder, which was lost, had sent a different layout of the item.
        """
        index = event.item_index
        if isinstance(event, RowsEvent):
            share.remove(index)
        else:
            earlier = self._layouts.setdefault(index, event.layout)
            if earlier != event.layout:
                raise InternalError(f"item {index} has layout {event.layout} now and had {earlier} before")
            if earlier is not event.layout:  # the layout was emitted before
                return
        await self.events.emit(event)


class _EncodeStream(RowStream[EncodeEvent]):
    """The responses of one Encode call. `items` are those of the call, in its order, by their index in the request."""

    def __init__(
        self,
        peer: EncoderPeer,
        connection: Connection[EncoderDescription],
        items: Mapping[int, MediaItem],
        buffers: HostBufferPool,
    ) -> None:
        super().__init__(peer, connection, connection.description.identity, buffers)
        self._merge_size = connection.description.merge_size
        self._items = list(items.items())

    @property
    def missing(self) -> str:
        num_missing = len(self._items) - self._num_complete
        return f"{num_missing} items" if num_missing else ""

    def receive(self, raw: bytes) -> EncodeEvent | None:
        response = parse_response(raw, encoder_pb2.EncodeResponse)
        if isinstance(response, ChunkView):
            return self._rows(response)
        kind = response.WhichOneof("event")
        if kind == "layout":
            return self._layout(response.layout)
        if kind == "ready":
            return self._rows(response.ready)
        if kind == "failed":
            failed = response.failed
            raise error_from_code(failed.code, failed.message, failed.retry_after_s)
        raise InternalError(f"{self._sender} sent an event of kind {kind!r}")

    def _layout(self, message: encoder_pb2.Layout) -> LayoutEvent:
        if message.item_index >= len(self._items):
            raise InternalError(f"{self._sender} sent a layout of item {message.item_index} of {len(self._items)}")
        index, item = self._items[message.item_index]
        layout = layout_from_proto(message, item, self._merge_size)
        self._announce(message.item_index, layout.num_tokens)
        return LayoutEvent(index, layout)

    def _rows(self, message: encoder_pb2.Ready | ChunkView) -> RowsEvent | None:
        rows = self._receive_rows(message)
        if rows is None:
            return None
        index, _ = self._items[message.item_index]
        return RowsEvent(index, rows)


def _release(event: EncodeEvent) -> None:
    if isinstance(event, RowsEvent):
        event.rows.release()
