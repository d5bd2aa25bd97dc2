"""The peers of a fleet that can be used, and which of them content is routed to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

from vitrine_vlm.embedding_transport.fleet.content_routing import RendezvousTable, load_bound
from vitrine_vlm.embedding_transport.fleet.row_peer import InFlightCount, RowPeer

PeerT = TypeVar("PeerT", bound=RowPeer[Any])


class ConnectedPeers(Generic[PeerT]):
    """The peers that are connected, or can be. A choice looks at a few of them; one that comes or goes costs no more.

    by_address: the peers; not to be changed.
    """

    def __init__(self) -> None:
        self.by_address: dict[str, PeerT] = {}
        self._count = InFlightCount()
        self._peers: list[PeerT] = []  # as in the table
        self._indices: dict[str, int] = {}
        self._table = RendezvousTable()

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def num_in_flight(self) -> int:
        """Items or requests that are in flight on these peers."""
        return self._count.total

    def add(self, peer: PeerT) -> None:
        """Adds a peer whose address is not among these."""
        self.by_address[peer.address] = peer
        self._indices[peer.address] = len(self._peers)
        self._peers.append(peer)
        self._table.append(peer.address_hash)
        self._count.total += peer.in_flight
        peer.counted_in = self._count

    def remove(self, peer: PeerT) -> None:
        """Removes one of these peers."""
        del self.by_address[peer.address]
        index, last = self._indices.pop(peer.address), self._peers.pop()
        if last is not peer:
            self._peers[index] = last
            self._indices[last.address] = index
        self._table.remove(index)
        self._count.total -= peer.in_flight
        peer.counted_in = None

    def has_usable(self, failed: Collection[str]) -> bool:
        """Whether some have not failed. failed: addresses."""
        return len(self._peers) > len(failed) or any(address not in failed for address in self.by_address)

    def has_suitable(self, passed_over: Collection[str], suits: Callable[[PeerT], bool]) -> bool:
        """Whether some suit and are not passed over. passed_over: addresses."""
        return any(peer.address not in passed_over and suits(peer) for peer in self._peers)

    def choose(self, key: bytes, failed: Collection[str], suits: Callable[[PeerT], bool] = lambda _: True) -> PeerT:
        """The peer that this content is routed to: the best one below its load bound.

        Args:
            failed: addresses that are not used; suits: whether a peer may be used. Some peer must be left.
        """
        peers = self._peers
        index = self._table.choose(
            key,
            lambda index: peers[index].in_flight,
            load_bound(self.num_in_flight, len(peers)),
            lambda index: peers[index].address not in failed and suits(peers[index]),
        )
        assert index is not None
        return peers[index]
