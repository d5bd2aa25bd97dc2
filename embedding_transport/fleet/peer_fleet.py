"""Several services of one kind that ship rows: their addresses, and which of them can be used now."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic

from vitrine_vlm.embedding_transport.fleet.connected_peers import ConnectedPeers, PeerT
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.supervisor import Supervisor

_LEAVING_POLL_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerStatus:
    """The current state of one service; `error` is the reason why it is not ready.

    idle: it is connected once a request needs it.
    """

    address: str
    ready: bool
    idle: bool
    transport: str | None
    in_flight: int
    error: str | None


@dataclass(frozen=True)
class ConnectionPolicy:
    """Which services are connected. The others are once a request needs them.

    num_kept: as many are always connected, if there are as many; a fleet that is not larger is connected as a whole.
    idle_s: a connection beyond these is closed after so many seconds without a request, a lease or rows.
    """

    num_kept: int = 32
    idle_s: float = 300.0


# For clients that must find a process among all of them, of which they know no address.
ALL_CONNECTED = ConnectionPolicy(num_kept=sys.maxsize)


class PeerFleet(ABC, Generic[PeerT]):
    """Connects to the services. Create and use it on one event loop.

    Args:
        addresses: "host:port" of each service; empty if `set_addresses` provides them.
        make_peer: creates the peer of an address.
        supervisor: owns the loops that keep the peers connected; by default a new one. Once one of its loops has
            failed, requests fail.
        connections: which of them are connected.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        make_peer: Callable[[str], PeerT],
        supervisor: Supervisor | None = None,
        connections: ConnectionPolicy | None = None,
    ) -> None:
        self._first_addresses = addresses
        self._supervisor = supervisor or Supervisor()
        self._make_peer = make_peer
        self._connections = connections or ConnectionPolicy()
        self._keeping: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        # By address: all of them, and those that are not idle. A fleet may have thousands, and few that are connected.
        self._peers: dict[str, PeerT] = {}
        self._open_peers: dict[str, PeerT] = {}
        self._leaving: dict[asyncio.Task[None], PeerT] = {}
        self._changed = asyncio.Event()
        # Those that requests may be sent to: those that are connected, and those that are not tried yet.
        self._usable = ConnectedPeers[PeerT]()

    async def start(self) -> None:
        """Starts to connect to the services that are kept connected, and waits for the first attempt of each.

        Raises:
            VitrineError: a service answers but cannot be used.
        """
        if self._first_addresses:
            self.set_addresses(self._first_addresses)
        for peer in list(self._open_peers.values()):
            await peer.attempted.wait()
            if peer.connection is None and type(peer.error) is not peer.unavailable:
                raise peer.error

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Sends new requests to these addresses only. Other peers are disconnected once they are idle."""
        for address in addresses:
            if address not in self._peers:
                self._peers[address] = peer = self._make_peer(address)
                peer.start(partial(self._notice_change, peer), self._supervisor)
                self._notice_change(peer)
        for address in sorted(self._peers.keys() - set(addresses)):
            peer = self._peers.pop(address)
            self._open_peers.pop(address, None)
            if address in self._usable.by_address:
                self._usable.remove(peer)
            leaving = self._supervisor.start_job(f"leaving {address}", self._disconnect_when_idle(peer))
            self._leaving[leaving] = peer
            leaving.add_done_callback(self._leaving.pop)
        self._changed.set()
        self._open_some()
        if self._keeping is None:
            self._keeping = self._supervisor.start_task("connections", self._keep_connections())

    async def close(self) -> None:
        """Sends the pending releases and disconnects."""
        leaving = dict(self._leaving)
        await self._supervisor.stop(*leaving, *([self._keeping] if self._keeping is not None else []))
        # Those that leave, too: a task that is cancelled before its first step closes nothing.
        await asyncio.gather(*(peer.close() for peer in (*self._peers.values(), *leaving.values())))

    @property
    def ready(self) -> bool:
        """Whether at least one service is connected."""
        return any(peer.connection is not None for peer in self._open_peers.values())

    @property
    def num_fallbacks(self) -> int:
        """Connections since the start that do not use the best transport the client accepts."""
        return sum(peer.num_fallbacks for peer in self._peers.values())

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

    def _check_loops(self) -> None:
        """
        Raises:
            VitrineError: a loop of this client has failed.
        """
        if self._supervisor.failure is not None:
            reason = str(self._supervisor.failure)
            raise self._unavailable({peer.address: peer.unavailable(reason) for peer in self._peers.values()})

    def _notice_change(self, peer: PeerT) -> None:
        if self._peers.get(peer.address) is peer:  # otherwise it leaves
            if peer.is_idle:
                self._open_peers.pop(peer.address, None)
            else:
                self._open_peers[peer.address] = peer
            self._notice_use(peer)
        self._changed.set()

    def _notice_use(self, peer: PeerT) -> None:
        was_usable = peer.address in self._usable.by_address
        if peer.is_usable and not was_usable:
            self._usable.add(peer)
        elif was_usable and not peer.is_usable:
            self._usable.remove(peer)
            self._lost.set()

    async def _keep_connections(self) -> None:
        """Replaces what is lost of the connections that are kept, and closes those that are idle."""
        while True:
            self._lost.clear()
            self._open_some()
            self._close_idle()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._connections.idle_s / 4):
                    await self._lost.wait()

    def _open_some(self) -> None:
        num_idle = len(self._peers) - len(self._open_peers)
        num_missing = self._connections.num_kept - (len(self._usable) - num_idle)
        if num_idle and num_missing > 0:
            idle = [peer for address, peer in self._peers.items() if address not in self._open_peers]
            # Others than those of the next client, so that all services have as many.
            for peer in random.sample(idle, min(num_idle, num_missing)):
                peer.open()

    def _close_idle(self) -> None:
        if len(self._open_peers) <= self._connections.num_kept:
            return
        connected = [peer for peer in self._open_peers.values() if peer.connection is not None]
        used_before = asyncio.get_running_loop().time() - self._connections.idle_s
        unused = [
            peer for peer in connected if not peer.in_flight and not peer.num_leases and peer.used_at < used_before
        ]
        unused.sort(key=lambda peer: peer.used_at)
        for peer in unused[: max(0, len(connected) - self._connections.num_kept)]:
            peer.disconnect()

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def status(self) -> list[PeerStatus]:
        return [
            PeerStatus(
                address=peer.address,
                ready=peer.connection is not None,
                idle=peer.is_idle,
                transport=peer.connection.transport if peer.connection else None,
                in_flight=peer.in_flight,
                error=None if peer.connection or peer.is_idle else str(peer.error),
            )
            for peer in self._peers.values()
        ]

    def _reasons(self, failures: Mapping[str, VitrineError]) -> str:
        """Says why no service can be used. `failures` are those of one request, by the address of the lost peer."""

        def reason(peer: PeerT) -> str:
            failure = failures.get(peer.address)
            if failure is None or (not peer.has_session and str(failure) == str(peer.error)):
                return str(peer.error)
            return f"{peer.service} {peer.address} was lost: {failure}"

        return "; ".join(map(reason, self._peers.values())) or "none was found"

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
