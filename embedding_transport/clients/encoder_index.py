"""What a client looks up among its connected encoders for each request, found once while they stay the same."""

from __future__ import annotations

from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderPeer
from vitrine_vlm.embedding_transport.fleet.connected_peers import ConnectedPeers


class EncoderIndex:
    """
    connected: the encoders that it is of, all of them connected when it is made.
    minors: the minor version of each one's protocol, by address. by_instance: those that have tickets, by their
    instance_id.
    """

    def __init__(self, connected: ConnectedPeers[EncoderPeer]) -> None:
        self.connected = connected
        descriptions = {
            address: peer.connection.description
            for address, peer in connected.by_address.items()
            if peer.connection is not None
        }
        self.minors = {address: each.minor_version for address, each in descriptions.items()}
        self.by_instance = {
            each.instance_id: connected.by_address[address]
            for address, each in descriptions.items()
            if each.instance_id
        }
        self._suited = {0: connected}

    def with_version(self, minor: int) -> ConnectedPeers[EncoderPeer]:
        """Those whose protocol has this minor version or a later one."""
        if minor not in self._suited:
            by_address = self.connected.by_address
            suited = [by_address[address] for address, each in self.minors.items() if each >= minor]
            # Of all of them the load is counted already.
            self._suited[minor] = self.connected if len(suited) == len(self.connected) else ConnectedPeers(suited)
        return self._suited[minor]
