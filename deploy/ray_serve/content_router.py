"""Which replica a request goes to: by its content, so that equal items meet the same cache, within a bound on load.

It is the rule of the LLM workers' EncoderClient: an item belongs to the same encoder whether it comes through the
gateway or through a worker.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vitrine_vlm.embedding_transport.fleet.content_routing import ranked


class ContentRouter(RequestRouter):
    """For `handle.choose_replica(key, avoided)`, see `ranked`; replicas give their address as metadata."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica: the next is taken only if the one before takes no more requests."""
        if pending_request is None:
            return [candidate_replicas]
        # If none does, another round begins a little later.
        pending_request.routing_context.should_backoff = True
        key, avoided = pending_request.args
        replicas = {replica.replica_metadata["address"]: replica for replica in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {address: known.get(replica.replica_id) or 0 for address, replica in replicas.items()}
        ranks = [[replicas[address]] for address in ranked(key, loads, avoided)]
        # Counted at once, so that a request right behind this one sees it. The replica's own count then replaces this.
        self.on_send_request(ranks[0][0].replica_id)
        return ranks
