"""The sessions of connected peers, and the transport of each: the shipping side of Connect."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from vitrine_vlm.embedding_transport.pools.pool import ExportPool
from vitrine_vlm.embedding_transport.wire.messages import offer_to_proto
from vitrine_vlm.errors import BadRequest, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import PROTOCOL_VERSION

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What a peer has negotiated.

    pool: where its rows are written; None if they are sent as bytes.
    accepts_bytes: whether rows that do not fit the pool may be sent as bytes.
    """

    session_id: str
    pool: ExportPool | None
    accepts_bytes: bool

    @property
    def transport(self) -> str:
        return self.pool.transport if self.pool is not None else "grpc"


class Sessions:
    """All open sessions. It belongs to one event loop.

    Args:
        pools: the pools to offer, best first; without any, rows are sent as bytes ("grpc").
        lease_ttl_s: the lease time that peers are informed of, seconds.
        on_end: called with the id of a session whose Connect stream has ended.
    """

    def __init__(self, pools: Sequence[ExportPool], lease_ttl_s: float, on_end: Callable[[str], None]) -> None:
        self.transports: tuple[str, ...] = (*(pool.transport for pool in pools), "grpc")
        self._pools = pools
        self._lease_ttl_s = lease_ttl_s
        self._on_end = on_end
        self._open: dict[str, Session] = {}
        self._draining = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, session_id: str) -> Session | None:
        """Returns the session, or None if it is unknown or has ended."""
        return self._open.get(session_id)

    def start_draining(self) -> None:
        """Notifies all peers that they must send no new requests."""
        self._draining.set()

    async def connect(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest]
    ) -> AsyncIterator[encoder_pb2.ConnectResponse]:
        """Serves one Connect call; the session ends with it.

        Raises:
            BadRequest: the peer does not follow the protocol.
            TransportUnavailable: no transport in common, or all probes failed and the peer does not accept bytes.
        """
        hello = await anext(requests, None)
        if hello is None or hello.WhichOneof("message") != "hello":
            raise BadRequest("the first message of Connect must be hello")
        if hello.hello.protocol_version != PROTOCOL_VERSION:
            raise BadRequest(f"protocol version {hello.hello.protocol_version}: this service needs {PROTOCOL_VERSION}")
        pool: ExportPool | None = None
        for offered in self._pools:
            if offered.transport in hello.hello.transports:
                yield encoder_pb2.ConnectResponse(offer=offer_to_proto(offered))
                answer = await anext(requests, None)
                if answer is None or answer.WhichOneof("message") != "probe_result":
                    raise BadRequest("the answer to an offer must be probe_result")
                if secrets.compare_digest(answer.probe_result.nonce, offered.nonce):
                    pool = offered
                    break
                reason = answer.probe_result.error or "wrong nonce"
                _log.warning("%s does not reach a peer: %s", offered.transport, reason)
        accepts_bytes = "grpc" in hello.hello.transports
        if pool is None and not accepts_bytes:
            raise TransportUnavailable(
                f"none of {list(hello.hello.transports)} reaches this service, which offers {list(self.transports)}"
            )
        session = Session(secrets.token_hex(16), pool, accepts_bytes)
        self._open[session.session_id] = session
        try:
            opened = encoder_pb2.Session(
                session_id=session.session_id, transport=session.transport, lease_ttl_s=self._lease_ttl_s
            )
            yield encoder_pb2.ConnectResponse(session=opened)
            async for response in self._hold(requests):
                yield response
        finally:
            del self._open[session.session_id]
            self._on_end(session.session_id)

    async def _hold(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest]
    ) -> AsyncIterator[encoder_pb2.ConnectResponse]:
        """Waits until the peer closes its side; notifies the peer when this service starts to drain."""
        peer_gone = asyncio.ensure_future(anext(requests, None))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait([peer_gone, draining], return_when=asyncio.FIRST_COMPLETED)
            if not peer_gone.done():
                yield encoder_pb2.ConnectResponse(draining=encoder_pb2.Draining())
            await peer_gone  # raises what is wrong with a message of the peer
        finally:
            peer_gone.cancel()
            draining.cancel()
