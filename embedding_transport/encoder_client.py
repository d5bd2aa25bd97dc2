"""The client of an encoder fleet: picks an encoder for each item, takes the rows in, goes on elsewhere if it dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch

from embedding_transport.chunk_codec import parse_response
from embedding_transport.content_routing import ranked
from embedding_transport.encode_receiver import EncodeReceiver
from embedding_transport.encoder_peer import EncoderDescription, EncoderPeer
from embedding_transport.encoder_rpc import encode_method
from embedding_transport.errors import EncoderUnavailable, InternalError, Overloaded
from embedding_transport.grpc_status import error_from_rpc
from embedding_transport.merge import merged
from embedding_transport.peer_fleet import PeerFleet
from embedding_transport.received_rows import HostBufferPool, LeasedRows
from embedding_transport.row_peer import Connection, ConnectOptions, TransportChoice
from embedding_transport.types import (
    EncodeEvent,
    Layout,
    LayoutEvent,
    MediaItem,
    ModelIdentity,
    RowsEvent,
)
from embedding_transport.wire import item_to_proto
from protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from service_runtime.cancellation import is_own_cancellation
from service_runtime.tls import ClientTls
from service_runtime.traces import outgoing_metadata


@dataclass
class ClientStats:
    """Since the start: requests, retries on another encoder, connections fallen back to bytes, bytes by transport."""

    requests: int
    retries: int
    fallbacks: int
    received_nbytes: dict[str, int]


class EncoderClient(PeerFleet[EncoderPeer]):
    """Encodes media on one of several encoders. Make and use it on one event loop.

    Args:
        addresses: "host:port" of every encoder; none if `set_addresses` is to say.
        expected: what the encoders must serve; None takes any.
        transport: "auto", or one transport and no other.
        shm_folder: shared-memory folder, the same as the encoders'.
        connect_timeout_s: for Describe and for the negotiation, each.
        encode_timeout_s: for one request on one encoder.
        gpu: on which rows are landed, if on any: then "auto" tries CUDA IPC first.
        tls: towards encoders; None for none.
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
    ) -> None:
        options = ConnectOptions(transport, shm_folder, connect_timeout_s, gpu, tls)
        super().__init__(addresses, lambda address: EncoderPeer(address, options, expected))
        self._encode_timeout_s = encode_timeout_s
        self._buffers = HostBufferPool()
        self._num_requests = 0
        self._num_retries = 0
        self._received_nbytes = {"cuda_ipc": 0, "shm": 0, "grpc": 0}

    async def encoder_stats(self, timeout_s: float = 1.0) -> dict[str, encoder_pb2.GetStatsResponse]:
        """What each encoder says of itself, by address; those that do not answer in time are left out."""

        async def ask(connection: Connection[EncoderDescription]) -> encoder_pb2.GetStatsResponse | None:
            try:
                stub = encoder_pb2_grpc.EncoderStub(connection.channel)
                return await stub.GetStats(encoder_pb2.GetStatsRequest(), timeout=timeout_s)
            except grpc.aio.AioRpcError:
                return None
            except asyncio.CancelledError:
                if is_own_cancellation():
                    raise
                return None  # the connection was closed meanwhile

        connected = {peer.address: peer.connection for peer in self._peers if peer.connection is not None}
        answers = await asyncio.gather(*map(ask, connected.values()))
        return {address: answer for address, answer in zip(connected, answers, strict=True) if answer is not None}

    def stats(self) -> ClientStats:
        return ClientStats(self._num_requests, self._num_retries, self.num_fallbacks, dict(self._received_nbytes))

    async def encode(
        self, items: Sequence[MediaItem], request_id: str, tenant: str = ""
    ) -> AsyncGenerator[EncodeEvent]:
        """Encodes the items of one request; yields a LayoutEvent and a RowsEvent for each, as they get there.

        The caller owns the rows it was given. Rows it was not given are released when the iteration ends or is closed.
        Items go to encoders one by one, by their content. If an encoder dies or is overloaded, what is missing is
        encoded on another one.

        Args:
            tenant: encoders use cached rows again within one tenant only.

        Raises:
            EncoderUnavailable: no encoder is left.
            Overloaded: those that are left are overloaded.
            VitrineError: the error of the first item that failed.
        """
        self._num_requests += 1
        # Off the loop: a long video takes a while. One encoder needs no choice.
        several = len(self._peers) > 1
        keys = await asyncio.to_thread(lambda: [item.content_key for item in items]) if several else [b""] * len(items)
        request = _Request(items, keys, request_id, tenant)
        async with aclosing(self._encode_all(request, range(len(items)))) as events:
            async for event in events:
                yield event

    async def _encode_all(self, request: _Request, indices: Sequence[int]) -> AsyncGenerator[EncodeEvent]:
        """These items of the request, on as many encoders as they belong to."""
        await self._until_tried()
        groups = self._spread(request, indices)
        streams = [self._encode_group(request, peer, pending) for peer, pending in groups.items()]
        try:
            async with aclosing(merged(streams, _release)) as events:
                async for event in events:
                    yield event
        finally:
            for peer, pending in groups.items():
                peer.in_flight -= len(pending)

    async def _encode_group(
        self, request: _Request, peer: EncoderPeer, pending: dict[int, MediaItem]
    ) -> AsyncGenerator[EncodeEvent]:
        """On one encoder, and what is missing of it on others if it is lost or overloaded.

        Args:
            pending: items counted as in flight there; one that is not any more is taken out.
        """
        try:
            async with aclosing(self._encode_on(peer, pending, request)) as events:
                async for event in events:
                    if isinstance(event, RowsEvent):
                        del pending[event.item_index]
                        peer.in_flight -= 1
                    elif _is_repeated(event, request.layouts):
                        continue
                    yield event
        except _EncoderLost as error:
            request.lost[peer.address] = f"encoder {peer.address} was lost: {error}"
        except Overloaded as error:
            request.lost[peer.address] = f"encoder {peer.address} is overloaded: {error}"
            request.overloaded.append(error)
        missing = list(pending)
        peer.in_flight -= len(missing)
        pending.clear()
        if missing:
            async with aclosing(self._encode_all(request, missing)) as events:
                async for event in events:
                    yield event

    def _spread(self, request: _Request, indices: Sequence[int]) -> dict[EncoderPeer, dict[int, MediaItem]]:
        """Each item to the connected encoder with the highest rendezvous score, among those with load to spare.

        They count as in flight there from now on, so that a request beside this one sees them.

        Raises:
            EncoderUnavailable, Overloaded: no encoder is left.
        """
        usable = [peer for peer in self._peers if peer.connection is not None and peer.address not in request.lost]
        if not usable:
            if request.overloaded:
                raise min(request.overloaded, key=lambda error: error.retry_after_s)
            raise self._unavailable(request.lost)
        if request.lost:
            self._num_retries += 1
        by_address = {peer.address: peer for peer in usable}
        groups: dict[EncoderPeer, dict[int, MediaItem]] = {}
        # The largest choose first, as far as that can be told from outside.
        for index in sorted(indices, key=lambda index: -len(request.items[index].data or b"")):
            loads = {peer.address: peer.in_flight for peer in usable}
            best = by_address[ranked(request.keys[index], loads)[0]]
            best.in_flight += 1
            groups.setdefault(best, {})[index] = request.items[index]
        return groups

    async def _encode_on(
        self, peer: EncoderPeer, pending: dict[int, MediaItem], request: _Request
    ) -> AsyncGenerator[EncodeEvent]:
        connection = peer.connection
        assert connection is not None
        indices = sorted(pending)
        message = encoder_pb2.EncodeRequest(
            request_id=request.request_id,
            session_id=connection.session_id,
            tenant=request.tenant,
            items=[item_to_proto(pending[index]) for index in indices],
        )
        receiver = EncodeReceiver(peer, connection, [pending[index] for index in indices], self._buffers)
        call = encode_method(connection.channel)(message, timeout=self._encode_timeout_s, metadata=outgoing_metadata())
        try:
            async for raw in call:
                for event in receiver.take(parse_response(raw, encoder_pb2.EncodeResponse)):
                    if isinstance(event, RowsEvent):
                        # An item larger than the pool comes as bytes although its session has one.
                        transport = connection.transport if isinstance(event.rows, LeasedRows) else "grpc"
                        self._received_nbytes[transport] += (
                            event.rows.num_tokens * connection.description.identity.row_nbytes
                        )
                        yield RowsEvent(indices[event.item_index], event.rows)
                    else:
                        yield LayoutEvent(indices[event.item_index], event.layout)
            if receiver.num_missing:
                raise _EncoderLost(f"it ended the stream with {receiver.num_missing} items missing")
        except grpc.aio.AioRpcError as error:
            if not receiver.num_missing:
                return
            named = error_from_rpc(error)
            if named is not None and not isinstance(named, EncoderUnavailable):
                raise named from error
            raise _EncoderLost(str(named or f"{error.code().name} {error.details()}")) from error
        except asyncio.CancelledError:
            if is_own_cancellation():
                raise
            if receiver.num_missing:
                raise _EncoderLost("the connection was closed") from None
        except EncoderUnavailable as error:  # of an item: the encoder is shutting down, or knows our session no more
            raise _EncoderLost(str(error)) from error
        finally:
            call.cancel()
            receiver.close()

    def _unavailable(self, lost: Mapping[str, str]) -> EncoderUnavailable:
        return EncoderUnavailable(f"no encoder is left to encode on: {self._reasons(lost)}; start one or give it time")


@dataclass
class _Request:
    """keys: of the items, by which they are routed; lost: encoders that failed this request, by address, and how."""

    items: Sequence[MediaItem]
    keys: Sequence[bytes]
    request_id: str
    tenant: str
    layouts: dict[int, Layout] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    overloaded: list[Overloaded] = field(default_factory=list)


class _EncoderLost(Exception):
    """The encoder, or the way to it, is gone; the request is not at fault."""


def _is_repeated(event: LayoutEvent, layouts: dict[int, Layout]) -> bool:
    """Whether this layout was handed out before, by an encoder that then died.

    Raises:
        InternalError: it was another one then.
    """
    earlier = layouts.setdefault(event.item_index, event.layout)
    if earlier != event.layout:
        raise InternalError(f"item {event.item_index} has layout {event.layout} now and had {earlier} before")
    return earlier is not event.layout


def _release(event: EncodeEvent) -> None:
    if isinstance(event, RowsEvent):
        event.rows.release()
