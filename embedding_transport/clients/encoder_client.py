"""The client of an encoder fleet: chooses an encoder for each item, receives the rows, retries on another encoder.

An item with a ticket can only be encoded by the encoder that has issued it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import grpc
import torch

from vitrine_vlm.embedding_transport.clients.encode_method import encode_in_pieces_method, encode_method
from vitrine_vlm.embedding_transport.clients.encode_request import Request, Share
from vitrine_vlm.embedding_transport.clients.encode_stream import EncodeStream, ItemMoved
from vitrine_vlm.embedding_transport.clients.encoder_peer import DescriptionCheck, EncoderDescription, EncoderPeer
from vitrine_vlm.embedding_transport.clients.fleet_client import ClientStats, Exchange, FleetClient
from vitrine_vlm.embedding_transport.clients.item_moves import ItemMoves
from vitrine_vlm.embedding_transport.fleet.connected_peers import ConnectedPeers
from vitrine_vlm.embedding_transport.fleet.peer_fleet import ConnectionPolicy
from vitrine_vlm.embedding_transport.fleet.pool_mapper import PoolMapper
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection, ConnectOptions, TransportChoice
from vitrine_vlm.embedding_transport.wire.messages import needed_minor_version
from vitrine_vlm.embedding_transport.wire.request_codec import serialize_request
from vitrine_vlm.embedding_transport.wire.request_pieces import MAX_PIECE_NBYTES, files_nbytes, first_message, in_pieces
from vitrine_vlm.errors import (
    EncoderMismatch,
    EncoderUnavailable,
    Overloaded,
    TicketExpired,
    VitrineError,
    soonest_overloaded,
)
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.retry import RetryPolicy
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ClientTls
from vitrine_vlm.types import (
    PROTOCOL_VERSION,
    EncodeEvent,
    Layout,
    LayoutEvent,
    MediaItem,
    MediaKind,
    ModelIdentity,
    RowsEvent,
    Ticket,
)

T = TypeVar("T")

# The first protocol_minor_version that has layouts alone.
_FIRST_WITH_LAYOUTS = 1
# The first that has requests in pieces, in which those with more bytes of files are sent.
_FIRST_WITH_PIECES = 4
_LARGE_REQUEST_NBYTES = 4 * 1024 * 1024
_ADDITIONS = {1: "patches and tickets", 2: "options of media and lists of frames"}
# Hashing fewer bytes takes less than a thread takes to start.
_LARGE_NBYTES = 64 * 1024
# More are not asked for their statistics at once.
_MAX_ASKED = 64
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
        mapper: maps the encoders' pools; by default this process does.
        check: compares what an encoder describes, see `EncoderPeer`.
        make_peer: creates the peer of an address; by default one that connects over gRPC.
        connections: which encoders are connected.
    """

    peer_kind = "encoder"
    _issuers: dict[str, EncoderPeer] | None = None  # None once a connection has changed

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
        mapper: PoolMapper | None = None,
        check: DescriptionCheck | None = None,
        make_peer: Callable[[str], EncoderPeer] | None = None,
        connections: ConnectionPolicy | None = None,
    ) -> None:
        options = ConnectOptions(transport, shm_folder, connect_timeout_s, gpu, tls, mapper)
        self._moves = ItemMoves()
        super().__init__(
            addresses,
            make_peer or (lambda address: EncoderPeer(address, options, expected, check)),
            ENCODE_RETRIES,
            encode_timeout_s,
            supervisor,
            connections,
        )

    def stats(self) -> ClientStats:
        return replace(super().stats(), moved=self._moves.num_moved)

    async def encoder_stats(self, timeout_s: float = 1.0) -> dict[str, encoder_pb2.GetStatsResponse]:
        """Returns the statistics of connected encoders by address, without those that do not answer in time.

        Of a large fleet the busiest are asked.
        """

        def get_stats(stub: encoder_pb2_grpc.EncoderAsyncStub) -> Awaitable[encoder_pb2.GetStatsResponse]:
            return stub.GetStats(encoder_pb2.GetStatsRequest(), timeout=timeout_s)

        peers = [peer for peer in self._peers.values() if peer.connection is not None]
        peers.sort(key=lambda peer: peer.in_flight, reverse=True)
        connected = {peer.address: peer.connection for peer in peers[:_MAX_ASKED] if peer.connection is not None}
        answers = await asyncio.gather(*(_try(connection, get_stats) for connection in connected.values()))
        return {address: answer for address, answer in zip(connected, answers, strict=True) if answer is not None}

    def encode(self, items: Sequence[MediaItem], request_id: str, tenant: str = "") -> AsyncGenerator[EncodeEvent]:
        """Encodes the items of one request; yields a LayoutEvent and a RowsEvent for each, as they arrive.

        The caller owns the rows that were yielded. All others are released when the iteration ends or is closed.
        Items go to encoders one by one, by their content. If an encoder dies or is overloaded, the missing items are
        encoded on another one. Items with a ticket go to the encoder that has issued it, and to no other.

        Args:
            tenant: encoders reuse cached rows within one tenant only; tickets belong to the tenant of their layouts.

        Raises:
            EncoderUnavailable: no encoder is left; EncoderMismatch: none that is left takes such items.
            Overloaded: all encoders that are left are overloaded, or that of a ticket is.
            TicketExpired: the encoder of a ticket is not connected or was lost, or the ticket has ended.
            VitrineError: the error of the first item that failed.
        """
        return self._run(Request(items, request_id, tenant, self._policy, self._discard))

    def layouts(
        self, items: Sequence[MediaItem], request_id: str, tenant: str = "", *, compute_ahead: bool = False
    ) -> AsyncGenerator[LayoutEvent]:
        """Yields a LayoutEvent with a ticket for each item, as they arrive; no rows are computed for it.

        Encoders are chosen as in `encode`. The caller owns the tickets that were yielded; all others are released when
        the iteration ends or is closed, except those that are on the wire just then: they expire.

        Args:
            compute_ahead: the rows will be claimed soon: encoders may compute them before.

        Raises:
            VitrineError: see `encode`; EncoderMismatch: no encoder that is left has tickets.
        """
        request = Request(
            items, request_id, tenant, self._policy, self._discard, layout_only=True, compute_ahead=compute_ahead
        )
        return cast("AsyncGenerator[LayoutEvent]", self._run(request))  # EncodeStream refuses rows

    async def release_tickets(self, tickets: Iterable[Ticket], timeout_s: float = 5.0) -> None:
        """Releases tickets at their encoders. Those of encoders that do not answer in time, or are lost, expire."""

        def release(stub: encoder_pb2_grpc.EncoderAsyncStub, values: list[bytes]) -> Awaitable[object]:
            return stub.Release(encoder_pb2.ReleaseRequest(tickets=values), timeout=timeout_s)

        by_encoder: dict[str, list[bytes]] = {}
        for ticket in tickets:
            by_encoder.setdefault(ticket.encoder_id, []).append(ticket.value)
        calls = [
            _try(connection, partial(release, values=values))
            for encoder_id, values in by_encoder.items()
            if (peer := self._by_instance().get(encoder_id)) is not None
            and (connection := peer.connection) is not None
            and connection.description.instance_id == encoder_id
        ]
        await asyncio.gather(*calls)

    async def renew_ticket(self, ticket: Ticket, kind: MediaKind, request_id: str, tenant: str) -> None:
        """Begins a ticket's time to live again, at encoders from minor version 5 of the protocol on.

        Raises:
            VitrineError: see `encode`.
        """
        async with aclosing(self.layouts([MediaItem(kind, ticket=ticket)], request_id, tenant)) as events:
            async for _ in events:
                pass

    def description_of(self, encoder_id: str) -> EncoderDescription | None:
        """Returns what the encoder with this instance_id says of itself; None if it is not connected."""
        peer = self._by_instance().get(encoder_id)
        return peer.connection.description if peer is not None and peer.connection is not None else None

    def _notice_change(self, peer: EncoderPeer) -> None:
        super()._notice_change(peer)
        self._issuers = None

    def set_addresses(self, addresses: Sequence[str]) -> None:
        self._issuers = None
        super().set_addresses(addresses)

    def _run(self, request: Request) -> AsyncGenerator[EncodeEvent]:
        self._num_requests += 1
        return request.events.read(partial(self._encode_all, request))

    def _discard(self, event: EncodeEvent) -> None:
        if isinstance(event, RowsEvent):
            event.rows.release()
        else:
            self._release_ticket(event.layout)

    def _release_ticket(self, layout: Layout) -> None:
        """Releases the layout's ticket, if it has one, in the background."""
        if layout.ticket is not None:
            self._supervisor.start_job("ticket release", self.release_tickets([layout.ticket]))

    def _by_instance(self) -> dict[str, EncoderPeer]:
        """The encoders that have tickets, by the instance_id that they have, or had while they were connected."""
        if self._issuers is None:
            described = ((peer, peer.description) for peer in self._peers.values())
            self._issuers = {
                description.instance_id: peer
                for peer, description in described
                if description is not None and description.instance_id
            }
        return self._issuers

    async def _encode_all(self, request: Request) -> None:
        if len(self._peers) > 1:  # with one encoder there is nothing to choose
            if sum(item.nbytes + len(item.url or "") for item in request.items) < _LARGE_NBYTES:
                request.keys = [item.content_key for item in request.items]
            else:
                request.keys = await asyncio.to_thread(lambda: [item.content_key for item in request.items])
        await self._encode(request, range(len(request.items)))

    async def _encode(self, request: Request, indices: Sequence[int]) -> None:
        """Chooses an encoder for each of these items and starts one call per encoder.

        Raises:
            EncoderUnavailable, Overloaded, TicketExpired: see `encode`.
        """
        items = request.items
        # All that waits or raises comes first: the items of a share count as in flight.
        issuers = {index: await self._issuer(request, ticket) for index in indices if (ticket := items[index].ticket)}
        others = [index for index in indices if index not in issuers]
        failures = request.attempts.failures
        usable = self._usable_for(request.attempts) if others else ConnectedPeers[EncoderPeer]()
        needed = {index: _needed_version(request, index) for index in others}
        for minor in sorted(set(needed.values())):
            _check_versions(minor, failures, usable)
        shares: dict[str, Share] = {}
        for index, peer in issuers.items():
            shares.setdefault(peer.address, Share(peer)).add(index)
        # The largest items are assigned first; the size of an item at a URL is unknown.
        for index in sorted(others, key=lambda index: -_nbytes(items[index])):
            suits = partial(_may_have, needed[index])
            passed_over = self._passed_over(failures, usable, suits)
            peer = usable.choose(request.keys[index], passed_over, suits)
            shares.setdefault(peer.address, Share(peer)).add(index)
        request.num_calls += len(shares)
        for share in shares.values():
            self._moves.add_call()
            request.events.start(partial(self._encode_share, request, share), share.release)

    def _passed_over(
        self,
        failures: Mapping[str, VitrineError],
        usable: ConnectedPeers[EncoderPeer],
        suits: Callable[[EncoderPeer], bool],
    ) -> Collection[str]:
        """Addresses that an item does not go to: those that failed, and slow ones while any other one is left."""
        slow = self._moves.passed_over(asyncio.get_running_loop().time())
        if not slow:
            return failures
        passed_over = failures.keys() | slow
        return passed_over if usable.has_suitable(passed_over, suits) else failures

    def _leaves(self, request: Request, share: Share, layout: Layout) -> bool:
        """Whether the items of a share go to another encoder, by how long the rows of one of them will take."""
        if layout.expected is None:
            return False
        is_long = self._moves.is_long(layout, layout.expected, share.peer.in_flight)
        items = [request.items[index] for index in share.pending]
        if not is_long or share.pending & request.moved or any(item.ticket is not None for item in items):
            return False
        address, now = share.peer.address, asyncio.get_running_loop().time()
        needed = max(_needed_version(request, index) for index in share.pending)
        others = {address, *request.attempts.failures, *self._moves.passed_over(now)}
        if not self._usable.has_suitable(others, partial(_may_have, needed)):
            return False
        if not self._moves.move(address, len(items), len(self._usable), now):
            return False
        self._release_ticket(layout)  # the call may have ended at the encoder, where cancelling it comes too late
        return True

    async def _issuer(self, request: Request, ticket: Ticket) -> EncoderPeer:
        """Returns the encoder of a ticket, once it is connected or all encoders were tried.

        Raises:
            TicketExpired: it is not connected, or was lost by this request; Overloaded: it refused this request.
        """
        self._check_loops()
        peer = self._by_instance().get(ticket.encoder_id)
        if peer is not None:
            peer.open()
            await peer.attempted.wait()
        else:  # a ticket names a process and no address: it may be any that is not connected
            asked = list(self._peers.values())
            for each in asked:
                each.open()

            def is_known() -> bool:
                return ticket.encoder_id in self._by_instance()

            await self._wait_until(lambda: is_known() or all(peer.attempted.is_set() for peer in asked))
        peer = self._by_instance().get(ticket.encoder_id)
        failure = request.attempts.failures.get(peer.address) if peer is not None else None
        if isinstance(failure, Overloaded):
            raise failure
        if peer is None or peer.connection is None or failure is not None:
            raise TicketExpired(
                f"the encoder {ticket.encoder_id} of ticket {ticket.value.hex()} is not connected "
                f"({failure or 'it was lost, shuts down or is not known here'}): ask for the layout again"
            )
        return peer

    async def _encode_share(self, request: Request, share: Share) -> None:
        """Encodes a share on its encoder; if that is lost, overloaded or slow, the missing items go to others."""
        try:
            await self._receive(share.peer, partial(self._exchange, request, share), partial(request.emit, share))
        except ItemMoved:
            request.moved |= share.pending
        except request.attempts.elsewhere as error:
            request.attempts.failed(share.peer.address, error)
        except VitrineError as error:
            if not request.layout_only:
                raise
            request.failure = request.failure or error
        missing = sorted(share.pending)
        share.release()
        if missing and request.failure is None:
            await self._encode(request, missing)
        request.num_calls -= 1
        if request.failure is not None and not request.num_calls:
            raise request.failure

    async def _exchange(
        self, request: Request, share: Share, connection: Connection[EncoderDescription]
    ) -> Exchange[EncodeEvent]:
        items = {index: request.items[index] for index in sorted(share.pending)}
        minor, needed = connection.description.minor_version, max(_needed_version(request, index) for index in items)
        if minor < needed:  # it was connected only after the choice
            raise share.peer.unavailable(_too_old(needed, {share.peer.address: minor}))
        stream = EncodeStream(
            share.peer,
            connection,
            items,
            self._buffers,
            layout_only=request.layout_only,
            leaves=partial(self._leaves, request, share),
        )
        head = encoder_pb2.EncodeRequest(
            request_id=request.request_id,
            session_id=connection.session_id,
            tenant=request.tenant,
            layout_only=request.layout_only,
            call_id=stream.call_id,
            compute_ahead=request.compute_ahead,
        )
        if minor >= _FIRST_WITH_PIECES and files_nbytes(items.values()) > _LARGE_REQUEST_NBYTES:
            first = first_message(head, items.values())
            if len(first) <= MAX_PIECE_NBYTES:  # it has all else, such as patches
                return encode_in_pieces_method(connection.channel), in_pieces(first, items.values()), stream
        message = await serialize_request(head, items.values())
        return encode_method(connection.channel), message, stream

    def _unavailable(self, failures: Mapping[str, VitrineError]) -> EncoderUnavailable:
        reasons = self._reasons(failures)
        return EncoderUnavailable(f"no encoder is left to encode on: {reasons}; start one, or wait until one is ready")


def _needed_version(request: Request, index: int) -> int:
    """The minor version of the protocol that an item of a request needs."""
    return max(needed_minor_version(request.items[index]), _FIRST_WITH_LAYOUTS if request.layout_only else 0)


def _may_have(minor: int, peer: EncoderPeer) -> bool:
    """Whether the peer has this minor version of the protocol, or a later one, as far as is known."""
    return peer.connection is None or peer.connection.description.minor_version >= minor


def _too_old(minor: int, found: Mapping[str, int]) -> str:
    versions = ", ".join(f"{address} has {PROTOCOL_VERSION}.{each}" for address, each in found.items())
    return (
        f"{_ADDITIONS[minor]} need encoders with version {PROTOCOL_VERSION}.{minor} of the protocol, but {versions}: "
        "update them"
    )


def _check_versions(minor: int, failures: Mapping[str, VitrineError], usable: ConnectedPeers[EncoderPeer]) -> None:
    """
    Raises:
        EncoderMismatch: none of those that have not failed has this minor version; Overloaded: those that have are
            overloaded.
    """
    left = (peer for peer in usable.by_address.values() if peer.address not in failures)
    if minor and not any(_may_have(minor, peer) for peer in left):
        found = {
            address: peer.connection.description.minor_version
            for address, peer in usable.by_address.items()
            if peer.connection is not None and address not in failures
        }
        raise soonest_overloaded(failures.values()) or EncoderMismatch(_too_old(minor, found))


def _nbytes(item: MediaItem) -> int:
    """Bytes of an item that travel in its message."""
    if item.frames is not None:
        return sum(len(frame.data or b"") for frame in item.frames)
    return len(item.patches.data if item.patches is not None else item.data or b"")


async def _try(
    connection: Connection[EncoderDescription],
    call: Callable[[encoder_pb2_grpc.EncoderAsyncStub], Awaitable[T]],
) -> T | None:
    """Returns an encoder's answer, or None if it does not answer."""
    try:
        return await call(encoder_pb2_grpc.EncoderStub(connection.channel))
    except (grpc.aio.AioRpcError, grpc.aio.UsageError):  # UsageError: the channel is closed already
        return None
    except asyncio.CancelledError:
        if is_own_cancellation():
            raise
        return None  # the connection was closed meanwhile
