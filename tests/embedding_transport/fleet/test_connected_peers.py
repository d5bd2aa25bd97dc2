"""The peers that can be used, while some come and others go."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Iterable

import pytest

from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderPeer
from vitrine_vlm.embedding_transport.fleet.connected_peers import ConnectedPeers
from vitrine_vlm.embedding_transport.fleet.row_peer import ConnectOptions
from vitrine_vlm.service_runtime.supervisor import Supervisor

OPTIONS = ConnectOptions(transport="grpc")


class CountsReads(EncoderPeer):
    """A peer that counts how often the table has asked for its part of scores."""

    num_reads = 0

    def __getattribute__(self, name: str) -> object:
        if name == "address_hash":
            CountsReads.num_reads += 1
        return super().__getattribute__(name)


@pytest.fixture
async def supervisor() -> AsyncGenerator[Supervisor]:
    made = Supervisor()
    yield made
    await made.close()


def peer_of(address: str, supervisor: Supervisor, in_flight: int = 0) -> EncoderPeer:
    peer = EncoderPeer(address, OPTIONS, None)
    peer.start(lambda: None, supervisor)
    peer.in_flight = in_flight
    return peer


def built_new(peers: Iterable[EncoderPeer], supervisor: Supervisor) -> ConnectedPeers[EncoderPeer]:
    """Others with the same addresses and as much in flight, added in another order."""
    made = ConnectedPeers[EncoderPeer]()
    for peer in sorted(peers, key=lambda peer: peer.address, reverse=True):
        made.add(peer_of(peer.address, supervisor, peer.in_flight))
    return made


@pytest.mark.parametrize("seed", range(8))
async def test_after_any_joins_and_leaves_choices_are_those_of_peers_that_were_there_from_the_start(
    seed: int, supervisor: Supervisor
) -> None:
    rng = random.Random(seed)
    peers, known = ConnectedPeers[EncoderPeer](), dict[str, EncoderPeer]()
    for step in range(600):
        growth = 0.7 if step < 300 else 0.4  # past the table's first room, and back
        if rng.random() < growth:
            peer = peer_of(f"10.0.0.{rng.randrange(400)}:50051", supervisor, rng.choice([0, 0, 1, 3]))
            if peer.address not in known:
                known[peer.address] = peer
                peers.add(peer)
        elif known:
            peer = known.pop(rng.choice(list(known)))
            peers.remove(peer)
            peer.in_flight += 1  # it does not count any more
        if known:
            rng.choice(list(known.values())).in_flight = rng.choice([0, 1, 2, 9])
        if step % 20 == 19 and known:
            other = built_new(known.values(), supervisor)
            assert peers.by_address == known and len(peers) == len(known)
            assert peers.num_in_flight == other.num_in_flight == sum(each.in_flight for each in known.values())
            failed = set(rng.sample(list(known), len(known) // 4))
            for _ in range(10):
                key = rng.randbytes(32)
                assert peers.choose(key, ()).address == other.choose(key, ()).address
                assert peers.choose(key, failed).address == other.choose(key, failed).address
    for peer in list(known.values()):
        peers.remove(peer)
    assert len(peers) == peers.num_in_flight == 0 and not peers.has_usable(())


async def test_a_peer_that_comes_or_goes_has_no_other_looked_at(supervisor: Supervisor) -> None:
    peers = ConnectedPeers[EncoderPeer]()
    many = [CountsReads(f"10.0.{number // 250}.{number % 250}:50051", OPTIONS, None) for number in range(1000)]
    for peer in many:
        peers.add(peer)
    CountsReads.num_reads = 0
    for peer in many[::7]:
        peers.remove(peer)
        peers.choose(b"key", ())
        peers.add(peer)
        peers.choose(b"key", ())
    assert CountsReads.num_reads == len(many[::7])
