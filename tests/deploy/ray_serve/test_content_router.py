"""Where requests go: by content, within a bound on load."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field

import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from deploy.ray_serve.content_router import ContentRouter, ranked

ADDRESSES = [f"10.0.0.{number}:50051" for number in range(5)]
KEYS = [hashlib.sha256(bytes([number])).digest() for number in range(200)]
DEPLOYMENT = DeploymentID(name="Encoder", app_name="vitrine")


def test_equal_content_goes_to_the_same_address_and_contents_spread() -> None:
    idle = dict.fromkeys(ADDRESSES, 0)
    first = {key: ranked(key, idle)[0] for key in KEYS}
    assert first == {key: ranked(key, dict(reversed(idle.items())))[0] for key in KEYS}
    assert min(Counter(first.values()).values()) > len(KEYS) / len(ADDRESSES) / 2


def test_a_new_address_takes_contents_only_for_itself() -> None:
    before = dict.fromkeys(ADDRESSES[:4], 0)
    after = dict.fromkeys(ADDRESSES, 0)
    moved = [key for key in KEYS if ranked(key, before)[0] != ranked(key, after)[0]]
    assert 0 < len(moved) < len(KEYS) / 2
    assert {ranked(key, after)[0] for key in moved} == {ADDRESSES[4]}


def test_it_is_the_choice_of_the_workers_encoder_client() -> None:
    for key in KEYS:
        best = max(ADDRESSES, key=lambda address: hashlib.sha256(key + address.encode()).digest())
        assert ranked(key, dict.fromkeys(ADDRESSES, 0))[0] == best


def test_no_address_takes_more_than_the_bound() -> None:
    loads = dict.fromkeys(ADDRESSES, 0)
    for total in range(1, 100):
        loads[ranked(KEYS[0], loads)[0]] += 1
        assert max(loads.values()) <= math.ceil(1.25 * total / len(ADDRESSES)), loads


def test_avoided_addresses_come_last_however_busy_the_others_are() -> None:
    loads = dict.fromkeys(ADDRESSES, 100) | {ADDRESSES[0]: 0}
    assert ranked(KEYS[0], loads, avoided=[ADDRESSES[0]])[-1] == ADDRESSES[0]
    assert len(ranked(KEYS[0], loads, avoided=ADDRESSES)) == len(ADDRESSES)


@dataclass(frozen=True)
class Replica:
    replica_id: ReplicaID
    replica_metadata: dict[str, str] = field(hash=False)


async def test_router_counts_requests_that_come_together() -> None:
    router = ContentRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    replicas = [Replica(ReplicaID(address, DEPLOYMENT), {"address": address}) for address in ADDRESSES]
    chosen: Counter[str] = Counter()
    for number in range(20):
        metadata = RequestMetadata(request_id=str(number), internal_request_id=str(number))
        request = PendingRequest(args=[KEYS[0], []], kwargs={}, metadata=metadata)
        ranks = await router.choose_replicas(replicas, request)
        assert sorted(replica.replica_metadata["address"] for [replica] in ranks) == ADDRESSES
        assert request.routing_context.should_backoff
        chosen[ranks[0][0].replica_metadata["address"]] += 1
    assert max(chosen.values()) <= 1.25 * 20 / len(ADDRESSES)
