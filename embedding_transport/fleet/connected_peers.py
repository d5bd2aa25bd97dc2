"""The peers of a fleet that can be used, and which of them content is routed to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeVar

from vitrine_vlm.embedding_transport.fleet.content_routing import RendezvousTable, load_bound
from vitrine_vlm.embedding_transport.fleet.row_peer import InFlightCount, RowPeer

PeerT = TypeVar("PeerT", bound=RowPeer[Any])


class ConnectedPeers(Generic[PeerT]):
    """The peers that are connected, or can be. Made again whenever others are, so that a choice looks at a few of them.

    by_address: the peers; not to be changed.

    Args:
        count: what is in flight on all of them, kept current by the peers.
    """

    def __init__(self, peers: Iterable[PeerT], count: InFlightCount) -> None:
        self.by_address = {peer.address: peer for peer in peers}
        self._peers = list(self.by_address.values())
        self._count = count
        self._table = RendezvousTable([peer.address_hash for peer in self._peers])

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def num_in_flight(self) -> int:
        """Items or requests that are in flight on these peers."""
        return self._count.total

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
