"""Several services of one kind that ship rows: their addresses, and which of them can be used now."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from vitrine_vlm.embedding_transport.fleet.connected_peers import ConnectedPeers, PeerT
from vitrine_vlm.embedding_transport.fleet.row_peer import InFlightCount
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.supervisor import Supervisor

_LEAVING_POLL_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerStatus:
    """The current state of one service; `error` is the reason why it is not ready."""

    address: str
    ready: bool
    transport: str | None
    in_flight: int
    error: str | None


class PeerFleet(ABC, Generic[PeerT]):
    """Keeps the services connected. Create and use it on one event loop.

    Args:
        addresses: "host:port" of each service; empty if `set_addresses` provides them.
        make_peer: creates the peer of an address.
        supervisor: owns the loops that keep the peers connected; by default a new one. Once one of its loops has
            failed, requests fail.
    """

    def __init__(
        self, addresses: Sequence[str], make_peer: Callable[[str], PeerT], supervisor: Supervisor | None = None
    ) -> None:
        self._first_addresses = addresses
        self._supervisor = supervisor or Supervisor()
        self._make_peer = make_peer
        self._peers: list[PeerT] = []
        self._leaving: dict[asyncio.Task[None], PeerT] = {}
        self._changed = asyncio.Event()
        self._connected_peers: ConnectedPeers[PeerT] | None = None  # None once a connection has changed

    async def start(self) -> None:
        """Starts to connect to every service and waits for the first attempt of each.

        Raises:
            VitrineError: a service answers but cannot be used.
        """
        if self._first_addresses:
            self.set_addresses(self._first_addresses)
        for peer in list(self._peers):
            await peer.attempted.wait()
            if peer.connection is None and type(peer.error) is not peer.unavailable:
                raise peer.error

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Sends new requests to these addresses only. Other peers are disconnected once they are idle."""
        known = {peer.address: peer for peer in self._peers}
        for address in addresses:
            if address not in known:
                peer = self._make_peer(address)
                peer.start(self._notice_change, self._supervisor)
                self._peers.append(peer)
        for address in sorted(known.keys() - set(addresses)):
            self._peers.remove(known[address])
            leaving = self._supervisor.start_job(f"leaving {address}", self._disconnect_when_idle(known[address]))
            self._leaving[leaving] = known[address]
            leaving.add_done_callback(self._leaving.pop)
        self._notice_change()

    async def close(self) -> None:
        """Sends the pending releases and disconnects."""
        leaving = dict(self._leaving)
        await self._supervisor.stop(*leaving)
        # Those that leave, too: a task that is cancelled before its first step closes nothing.
        await asyncio.gather(*(peer.close() for peer in (*self._peers, *leaving.values())))

    @property
    def ready(self) -> bool:
        """Whether at least one service is connected."""
        return len(self._connected) > 0

    @property
    def num_fallbacks(self) -> int:
        """Connections since the start that do not use the best transport the client accepts."""
        return sum(peer.num_fallbacks for peer in self._peers)

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until at least one service is connected.

        Raises:
            VitrineError: none was connected within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_until(lambda: self.ready)
        except TimeoutError:
            raise self._unavailable({}) from None

    async def _wait_until_attempted(self) -> None:
        """Waits while no service is connected and the first attempt on some is in flight: they may replace lost ones.

        Raises:
            VitrineError: a loop of this client has failed.
        """
        if self._supervisor.failure is not None:
            reason = str(self._supervisor.failure)
            raise self._unavailable({peer.address: peer.unavailable(reason) for peer in self._peers})
        await self._wait_until(lambda: self.ready or all(peer.attempted.is_set() for peer in self._peers))

    @property
    def _connected(self) -> ConnectedPeers[PeerT]:
        if self._connected_peers is None:
            connected = [peer for peer in self._peers if peer.connection is not None]
            count = InFlightCount(sum(peer.in_flight for peer in connected))
            for peer in connected:
                peer.counted_in = count
            self._connected_peers = ConnectedPeers(connected, count)
        return self._connected_peers

    def _notice_change(self) -> None:
        self._connected_peers = None
        self._changed.set()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def status(self) -> list[PeerStatus]:
        return [
            PeerStatus(
                address=peer.address,
                ready=peer.connection is not None,
                transport=peer.connection.transport if peer.connection else None,
                in_flight=peer.in_flight,
                error=None if peer.connection else str(peer.error),
            )
            for peer in self._peers
        ]

    def _reasons(self, failures: Mapping[str, VitrineError]) -> str:
        """Says why no service can be used. `failures` are those of one request, by the address of the lost peer."""

        def reason(peer: PeerT) -> str:
            failure = failures.get(peer.address)
            return str(peer.error) if failure is None else f"{peer.service} {peer.address} was lost: {failure}"

        return "; ".join(map(reason, self._peers)) or "none was found"

    @abstractmethod
    def _unavailable(self, failures: Mapping[str, VitrineError]) -> VitrineError:
        """Returns the error for a request that no service is left for."""

    async def _disconnect_when_idle(self, peer: PeerT) -> None:
        """Disconnects once the peer has no request in flight and no lease is held, or its session has ended."""
        _log.info("%s %s was removed from the addresses", peer.service, peer.address)
        try:
            while peer.has_session and (peer.in_flight or peer.num_leases):  # noqa: ASYNC110 both may grow, too
                await asyncio.sleep(_LEAVING_POLL_S)
        finally:
            await peer.close()
