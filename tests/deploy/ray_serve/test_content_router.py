"""Where requests go: by content, within a bound on load."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from vitrine_vlm.deploy.ray_serve.content_router import ContentRouter

ADDRESSES = [f"10.0.0.{number}:50051" for number in range(5)]
KEYS = [hashlib.sha256(bytes([number])).digest() for number in range(200)]
DEPLOYMENT = DeploymentID(name="Encoder", app_name="vitrine")


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
        ranks = await router.choose_replicas(replicas, request)  # type: ignore[arg-type]
        assert sorted(replica.replica_metadata["address"] for [replica] in ranks) == ADDRESSES
        assert request.routing_context.should_backoff
        chosen[ranks[0][0].replica_metadata["address"]] += 1
    assert max(chosen.values()) <= 1.25 * 20 / len(ADDRESSES)
