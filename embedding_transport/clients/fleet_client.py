"""A client of several services that ship rows: chooses one by content, receives rows, retries on another one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

import grpc

from vitrine_vlm.embedding_transport.fleet.connected_peers import ConnectedPeers, PeerT
from vitrine_vlm.embedding_transport.fleet.peer_fleet import ConnectionPolicy, PeerFleet
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection
from vitrine_vlm.embedding_transport.receiving.received_rows import HostBufferPool, LeasedRows
from vitrine_vlm.embedding_transport.receiving.row_stream import RowStream
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.errors import VitrineError, soonest_overloaded
from vitrine_vlm.service_runtime.access_log import report_peer
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.retry import Attempts, RetryPolicy
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.traces import outgoing_metadata
from vitrine_vlm.types import RowsEvent

# A request goes to another peer that is connected where its own does not connect in this time: connecting takes
# milliseconds, and a host that has lost its network does not refuse.
_CONNECT_WAIT_S = 1.0

EventT = TypeVar("EventT")
# The method to call, the request message or an iterator of its pieces, and the stream that parses the responses.
Exchange: TypeAlias = tuple[
    grpc.aio.UnaryStreamMultiCallable[Any, bytes] | grpc.aio.StreamStreamMultiCallable[Any, bytes],
    Any,
    RowStream[EventT],
]


@dataclass
class ClientStats:
    """Counts since the start.

    fallbacks: connections that do not use the best transport the client accepts.
    received_nbytes: bytes of rows by transport.
    moved: items that were taken to another encoder because theirs is slow.
    """

    requests: int
    retries: int
    fallbacks: int
    received_nbytes: dict[str, int]
    moved: int = 0


class FleetClient(PeerFleet[PeerT]):
    """The common part of the clients of encoders and of prefill workers.

    peer_kind: what a peer is called in the log.

    Args:
        addresses, make_peer, supervisor, connections: see PeerFleet.
        policy: must have a budget of 0: every peer is tried once.
        timeout_s: seconds for one request on one peer.
    """

    peer_kind: ClassVar[str]

    def __init__(
        self,
        addresses: Sequence[str],
        make_peer: Callable[[str], PeerT],
        policy: RetryPolicy[VitrineError],
        timeout_s: float,
        supervisor: Supervisor | None = None,
        connections: ConnectionPolicy | None = None,
    ) -> None:
        super().__init__(addresses, make_peer, supervisor, connections)
        self._policy = policy
        self._timeout_s = timeout_s
        self._buffers = HostBufferPool()
        self._num_requests = 0
        self._num_retries = 0
        self._received_nbytes = {"cuda_ipc": 0, "shm": 0, "grpc": 0}

    def stats(self) -> ClientStats:
        return ClientStats(self._num_requests, self._num_retries, self.num_fallbacks, dict(self._received_nbytes))

    def _usable_for(self, attempts: Attempts[VitrineError]) -> ConnectedPeers[PeerT]:
        """Returns the usable peers, of which some have not failed this request. Choose one without awaiting.

        Raises:
            VitrineError: none is left; Overloaded, with the shortest retry time, if any was overloaded.
        """
        self._check_loops()
        failures = attempts.failures
        usable = self._usable
        if not usable.has_usable(failures):
            raise soonest_overloaded(failures.values()) or self._unavailable(failures)
        if failures:
            self._num_retries += 1
        return usable

    async def _receive(
        self,
        peer: PeerT,
        exchange: Callable[[Connection[Any]], Awaitable[Exchange[EventT]]],
        emit: Callable[[EventT], Awaitable[None]],
    ) -> None:
        """Makes one call on one peer and emits its events.

        Raises:
            VitrineError: the call failed; the peer's `unavailable` if the peer was lost.
        """
        connection = await peer.connected(_CONNECT_WAIT_S if self.ready else None)
        report_peer(self.peer_kind, peer.address)
        method, message, stream = await exchange(connection)
        call: grpc.aio.UnaryStreamCall[Any, bytes] | grpc.aio.StreamStreamCall[Any, bytes] | None = None
        is_read = False  # whether all that the peer has sent was read
        try:
            call = method(message, timeout=self._timeout_s, metadata=outgoing_metadata())
            # Reads to the end, also once nothing is missing: cancelling a call releases its leases.
            while isinstance(raw := await call.read(), bytes):
                event = stream.receive(raw)
                if event is not None:
                    self._count(event, stream, connection)
                    await emit(event)
            is_read = True
            if stream.missing:
                raise peer.unavailable(f"it ended the stream with {stream.missing} missing")
            stream.end()
        except grpc.aio.AioRpcError as error:
            named = error_from_rpc(error)
            is_read = named is not None  # an error of the peer comes behind all that it has sent
            if stream.missing:
                raise named or peer.unavailable(f"{error.code().name} {error.details()}") from error
        except grpc.aio.UsageError as error:  # grpc raises this for a call on a closed channel
            if stream.missing:
                raise peer.unavailable("the connection was closed") from error
        except asyncio.CancelledError:
            if is_own_cancellation():
                raise
            if stream.missing:
                raise peer.unavailable("the connection was closed") from None
        finally:
            if call is not None:
                call.cancel()
                if stream.missing and not is_read:  # the peer may have ended the call before it learns of this
                    stream.release_unread()
            stream.close()

    def _count(self, event: object, stream: RowStream[Any], connection: Connection[Any]) -> None:
        if isinstance(event, RowsEvent):
            # An item larger than the pool is sent as bytes, although its session has a pool.
            transport = connection.transport if isinstance(event.rows, LeasedRows) else "grpc"
            self._received_nbytes[transport] += event.rows.num_tokens * stream.row_format.row_nbytes
