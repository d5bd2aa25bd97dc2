"""Routes requests to replicas by content, so that equal items reach the same cache, within a bound on the load.

LLM workers' EncoderClient has the same rule: an item is routed to the same encoder whether it comes through the gateway
or through a worker.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vitrine_vlm.embedding_transport.fleet.content_routing import ranked


class ContentRouter(RequestRouter):
    """Routes `handle.choose_replica(key, avoided)`, see `ranked`; the address is in each replica's metadata."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns ranks of one replica each: the next is used only if the one before accepts no more requests."""
        if pending_request is None:
            return [candidate_replicas]
        # If no replica accepts it, another round begins a little later.
        pending_request.routing_context.should_backoff = True
        key, avoided = pending_request.args
        replicas = {replica.replica_metadata["address"]: replica for replica in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {address: known.get(replica.replica_id) or 0 for address, replica in replicas.items()}
        ranks = [[replicas[address]] for address in ranked(key, loads, avoided)]
        # Counted at once, so that the next request respects it. The replica's own count then replaces this one.
        self.on_send_request(ranks[0][0].replica_id)
        return ranks
