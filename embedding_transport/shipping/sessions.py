"""The sessions of connected peers, and the transport of each: the shipping side of Connect."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vitrine_vlm.embedding_transport.pools.fair_share import Holder
from vitrine_vlm.embedding_transport.pools.pool import ExportPool
from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules
from vitrine_vlm.embedding_transport.wire.messages import offer_to_proto
from vitrine_vlm.errors import BadRequest, EncoderUnavailable, Overloaded, TransportUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.peers import Peer
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.types import PROTOCOL_VERSION

# For each message of the negotiation, in which a peer maps a pool.
_ANSWER_TIMEOUT_S = 30.0
# Sessions last as long as their peers want: none can say when one will end.
_RETRY_S = 5.0
# After `close`: the calls only have to leave their last line.
_END_TIMEOUT_S = 0.5
_MAX_TRANSPORTS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What a peer has negotiated.

    peer: whose it is. pool: where its rows are written; None if they are sent as bytes.
    accepts_bytes: whether rows that do not fit the pool may be sent as bytes.
    """

    session_id: str
    peer: Peer
    pool: ExportPool | None
    accepts_bytes: bool

    @property
    def transport(self) -> str:
        return self.pool.transport if self.pool is not None else "grpc"

    @property
    def holder(self) -> Holder:
        """By which its blocks of the pool are counted."""
        return Holder(self.peer.name, self.session_id)


class Sessions:
    """All open sessions. It belongs to one event loop.

    Args:
        pools: the pools to offer, best first; without any, rows are sent as bytes ("grpc").
        lease_ttl_s: the lease time that peers are informed of, seconds.
        rules: which peers may map the pools, and how many sessions there may be.
        on_begin, on_end: called with each session, and when its Connect stream has ended.
    """

    def __init__(
        self,
        pools: Sequence[ExportPool],
        lease_ttl_s: float,
        rules: PeerRules,
        on_begin: Callable[[Session], None],
        on_end: Callable[[Session], None],
    ) -> None:
        self.transports: tuple[str, ...] = (*(pool.transport for pool in pools), "grpc")
        self._pools = pools
        self._lease_ttl_s = lease_ttl_s
        self._rules = rules
        self._on_begin, self._on_end = on_begin, on_end
        self._open: dict[str, Session] = {}
        # Connect calls by peer, those included that have not negotiated yet.
        self._num_calls: Counter[str] = Counter()
        self._calls = RunningCalls()
        self._draining = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, session_id: str) -> Session | None:
        """Returns the session, or None if it is unknown or has ended."""
        return self._open.get(session_id)

    def start_draining(self) -> None:
        """Notifies all peers that they must send no new requests, and refuses new sessions."""
        self._calls.refuse(_shutting_down)
        self._draining.set()

    async def close(self) -> None:
        """Ends all Connect calls, which last as long as their peers want, and refuses new ones."""
        self._calls.end(_shutting_down)
        await self._calls.idle(_END_TIMEOUT_S)

    async def connect(
        self, requests: AsyncIterator[encoder_pb2.ConnectRequest], peer: Peer
    ) -> AsyncGenerator[encoder_pb2.ConnectResponse]:
        """Serves one Connect call; the session ends with it.

        Raises:
            BadRequest: the peer does not follow the protocol.
            EncoderUnavailable: the service is shutting down; also in the middle of a session, see `close`.
            Overloaded: there are as many sessions as are allowed, of this peer or in all.
            TransportUnavailable: no transport in common, or all probes failed and the peer does not accept bytes.
        """
        with self._calls.track(), self._counted(peer):
            hello = await _next(requests)
            if hello is None or hello.WhichOneof("message") != "hello":
                raise BadRequest("the first message of Connect must be hello")
            if hello.hello.protocol_version != PROTOCOL_VERSION:
                version = hello.hello.protocol_version
                raise BadRequest(f"protocol version {version}: this service needs {PROTOCOL_VERSION}")
            if len(hello.hello.transports) > _MAX_TRANSPORTS:
                raise BadRequest(f"{len(hello.hello.transports)} transports: at most {_MAX_TRANSPORTS} are looked at")
            pool: ExportPool | None = None
            for offered in self._pools:
                if offered.transport in hello.hello.transports and self._rules.may_map(peer):
                    yield encoder_pb2.ConnectResponse(offer=offer_to_proto(offered))
                    answer = await _next(requests)
                    if answer is None or answer.WhichOneof("message") != "probe_result":
                        raise BadRequest("the answer to an offer must be probe_result")
                    if secrets.compare_digest(answer.probe_result.nonce, offered.nonce):
                        pool = offered
                        break
                    reason = answer.probe_result.error or "wrong nonce"
                    _log.warning("%s does not reach a peer: %s", offered.transport, reason)
            accepts_bytes = "grpc" in hello.hello.transports
            if pool is None and not accepts_bytes:
                if not self._rules.may_map(peer):
                    raise TransportUnavailable(
                        f"{peer.name} may not map the pools here: name it in --shared-pool-peers, or accept grpc, too"
                    )
                raise TransportUnavailable(
                    f"none of {[name[:40] for name in hello.hello.transports]} reaches this service, which offers "
                    f"{list(self.transports)}"
                )
            session = Session(secrets.token_hex(16), peer, pool, accepts_bytes)
            self._open[session.session_id] = session
            self._on_begin(session)
            try:
                opened = encoder_pb2.Session(
                    session_id=session.session_id, transport=session.transport, lease_ttl_s=self._lease_ttl_s
                )
                yield encoder_pb2.ConnectResponse(session=opened)
                # Nothing is read any more, as a message that is read may have any length: the session ends with the
                # call, which raises CancelledError here.
                await self._draining.wait()
                yield encoder_pb2.ConnectResponse(draining=encoder_pb2.Draining())
                await asyncio.Future()
            finally:
                del self._open[session.session_id]
                self._on_end(session)

    @contextmanager
    def _counted(self, peer: Peer) -> Iterator[None]:
        """Counts a Connect call of this peer until its end.

        Raises:
            Overloaded: see `connect`.
        """
        rules, num_all, num_of_peer = self._rules, self._num_calls.total(), self._num_calls[peer.name]
        if num_of_peer >= rules.max_sessions_per_peer:
            raise Overloaded(
                f"{num_of_peer} connections of {peer.name} are open, as many as are accepted of one peer: send all "
                "requests over one, or raise --max-sessions-per-peer",
                _RETRY_S,
            )
        if num_all >= rules.max_sessions:
            raise Overloaded(f"{num_all} connections are open, as many as are accepted: raise --max-sessions", _RETRY_S)
        self._num_calls[peer.name] += 1
        try:
            yield
        finally:
            self._num_calls[peer.name] -= 1
            if not self._num_calls[peer.name]:
                del self._num_calls[peer.name]


def _shutting_down() -> EncoderUnavailable:
    return EncoderUnavailable("this service is shutting down: connect to another one")


async def _next(requests: AsyncIterator[encoder_pb2.ConnectRequest]) -> encoder_pb2.ConnectRequest | None:
    """Returns the peer's next message of the negotiation; None at its end.

    Raises:
        BadRequest: it did not come in time.
    """
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            return await anext(requests, None)
    except TimeoutError:
        raise BadRequest(f"no message came within {_ANSWER_TIMEOUT_S:g} s: negotiate right after Connect") from None
