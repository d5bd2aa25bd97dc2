"""Several services of one kind that ship rows: which there are, and which of them can be used now."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vitrine_vlm.embedding_transport.fleet.row_peer import RowPeer
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.supervisor import Supervisor

_LEAVING_POLL_S = 0.1

_log = logging.getLogger(__name__)

PeerT = TypeVar("PeerT", bound=RowPeer[Any])


@dataclass(frozen=True)
class PeerStatus:
    """One service as of now; `error` says why it is not ready."""

    address: str
    ready: bool
    transport: str | None
    in_flight: int
    error: str | None


class PeerFleet(ABC, Generic[PeerT]):
    """Keeps them connected. Make and use it on one event loop.

    Args:
        addresses: "host:port" of each; none if `set_addresses` is to say.
        make_peer: for an address.
        supervisor: owns the loops that keep them connected; None for one of its own. Once it has seen a failure,
            requests fail.
    """

    def __init__(
        self, addresses: Sequence[str], make_peer: Callable[[str], PeerT], supervisor: Supervisor | None = None
    ) -> None:
        self._first_addresses = addresses
        self._supervisor = supervisor or Supervisor()
        self._make_peer = make_peer
        self._peers: list[PeerT] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Begins to connect to every one and waits for the first attempt of each.

        Raises:
            VitrineError: one that answers cannot be used.
        """
        if self._first_addresses:
            self.set_addresses(self._first_addresses)
        for peer in list(self._peers):
            await peer.attempted.wait()
            if peer.connection is None and type(peer.error) is not peer.unavailable:
                raise peer.error

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Uses these from now on. Those that are not among them finish what they have."""
        known = {peer.address: peer for peer in self._peers}
        for address in addresses:
            if address not in known:
                peer = self._make_peer(address)
                peer.start(self._changed.set, self._supervisor)
                self._peers.append(peer)
        for address in known.keys() - set(addresses):
            self._peers.remove(known[address])
            leaving = self._supervisor.start_job(f"leaving {address}", self._let_go(known[address]))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        self._changed.set()

    async def close(self) -> None:
        """Gives back what is released and disconnects."""
        await self._supervisor.stop(*self._leaving)
        await asyncio.gather(*(peer.close() for peer in self._peers))

    @property
    def ready(self) -> bool:
        """Whether any is connected."""
        return any(peer.connection is not None for peer in self._peers)

    @property
    def num_fallbacks(self) -> int:
        """Connections that came down to bytes, since the start."""
        return sum(peer.num_fallbacks for peer in self._peers)

    async def wait_ready(self, timeout_s: float) -> None:
        """
        Raises:
            VitrineError: none got connected within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._until(lambda: self.ready)
        except TimeoutError:
            raise self._unavailable({}) from None

    async def _until_tried(self) -> None:
        """Waits while none is connected and some are tried for the first time: they may be there to replace others.

        Raises:
            VitrineError: a loop of this client has failed.
        """
        if self._supervisor.failure is not None:
            reason = str(self._supervisor.failure)
            raise self._unavailable({peer.address: peer.unavailable(reason) for peer in self._peers})
        await self._until(lambda: self.ready or all(peer.attempted.is_set() for peer in self._peers))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
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
        """Why none can be used. `failures`: of one request, by the address of the peer that was lost."""

        def reason(peer: PeerT) -> str:
            failure = failures.get(peer.address)
            return str(peer.error) if failure is None else f"{peer.service} {peer.address} was lost: {failure}"

        return "; ".join(map(reason, self._peers)) or "none was found"

    @abstractmethod
    def _unavailable(self, failures: Mapping[str, VitrineError]) -> VitrineError:
        """The error of a request that no service is left for."""

    async def _let_go(self, peer: PeerT) -> None:
        """Disconnects once nothing is under way there and none of its rows are held, or if it is gone."""
        _log.info("%s %s is not one of ours any more", peer.service, peer.address)
        try:
            while peer.has_session and (peer.in_flight or peer.num_held):  # noqa: ASYNC110 it counts up, too
                await asyncio.sleep(_LEAVING_POLL_S)
        finally:
            await peer.close()
