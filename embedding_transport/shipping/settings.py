"""Settings about the peers of a service that ships rows."""

from __future__ import annotations

from dataclasses import replace

from pydantic import BaseModel, Field, field_validator

from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules, every_peer
from vitrine_vlm.service_runtime.peers import PeerPatterns


class PeerSettings(BaseModel):
    """Who may connect, and how much of the service a peer may use. A base for settings; it needs pydantic."""

    allowed_peers: str = Field(
        "",
        description="names in the certificates of those that may ask for rows here: DNS names and URIs, separated by "
        "commas, * for one label or path segment; empty: all certificates of --tls-client-ca-file",
    )
    shared_pool_peers: str = Field(
        "",
        description="likewise, of those that may map the pools, and so read each other's rows; others get theirs as "
        "bytes; empty: those that --allowed-peers names, and all where no certificates are required",
    )
    max_sessions: int = Field(1024, ge=1, description="connected peers, in all")
    max_sessions_per_peer: int = Field(
        256, ge=1, description="connections of one peer, by its certificate's name or else its host"
    )

    @field_validator("allowed_peers", "shared_pool_peers")
    @classmethod
    def _check_names(cls, names: str) -> str:
        PeerPatterns.parse(names)
        return names

    def peer_rules(self, requires_certificates: bool) -> PeerRules:
        """
        Raises:
            ValueError: peers are named, and no certificates are required in which a name could stand.
        """
        rules = PeerRules(max_sessions=self.max_sessions, max_sessions_per_peer=self.max_sessions_per_peer)
        if not requires_certificates:
            if self.allowed_peers or self.shared_pool_peers:
                raise ValueError("--allowed-peers and --shared-pool-peers need --tls-client-ca-file beside them")
            return rules
        allowed = PeerPatterns.parse(self.allowed_peers)
        sharing = PeerPatterns.parse(self.shared_pool_peers or self.allowed_peers)
        return replace(rules, may_call=allowed.match if allowed else every_peer, may_map=sharing.match)
