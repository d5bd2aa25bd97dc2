"""The connections between workers and encoders: calls, sessions and leases as the product's client sees them."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar, TypeVarTuple, cast

import grpc

from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderPeer, check_identity
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection, ConnectOptions
from vitrine_vlm.embedding_transport.pools.fair_share import Holder
from vitrine_vlm.embedding_transport.wire.grpc_status import ERROR_CODE_KEY, STATUS_BY_CODE
from vitrine_vlm.errors import EncoderMismatch, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.simulation.costs import IDENTITY
from vitrine_vlm.simulation.encoder import SimulatedEncoder
from vitrine_vlm.simulation.network import Link, Port, transfer
from vitrine_vlm.simulation.virtual_loop import VirtualLoop

T = TypeVar("T")
Args = TypeVarTuple("Args")

# The product's: leases released within this time go together; a lost encoder is tried again after up to two seconds.
_RELEASE_BATCH_S = 0.01
_RECONNECT_S = (1.0, 2.0)


class SimulatedCall:
    """One Encode call: what the client reads, and what the encoder sends."""

    def __init__(self, connection: SimulatedConnection, message: bytes, timeout_s: float) -> None:
        self.connection = connection
        self._received: deque[bytes] = deque()
        self._over: object = None  # EOF, or the error with which the call ends
        self._reader: asyncio.Future[None] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._cancelled = False
        self._last_at = 0.0  # when the last message to the worker arrives: the next one comes behind it
        loop = connection.loop
        self._deadline = loop.call_later(timeout_s, self._expire)
        connection.to_encoder(self._serve, message, timeout_s)

    # The client's side.

    async def read(self) -> object:
        while True:
            if self._received:
                return self._received.popleft()
            if isinstance(self._over, grpc.aio.AioRpcError):
                raise self._over
            if self._over is not None:
                return self._over
            self._reader = self.connection.loop.create_future()
            await self._reader

    def cancel(self) -> None:
        self._deadline.cancel()
        if not self._cancelled and self._over is None:
            self._over = grpc.aio.EOF
            self.connection.to_encoder(self.stop)
        self._cancelled = True
        self.connection.calls.pop(self, None)

    # The encoder's side.

    def send(self, response: encoder_pb2.EncodeResponse) -> None:
        self._to_worker(self._receive, response.SerializeToString())

    async def send_rows(self, response: encoder_pb2.EncodeResponse, nbytes: int) -> None:
        connection, raw = self.connection, response.SerializeToString()
        loop, link = connection.loop, connection.link
        left_at = transfer(link, connection.encoder.port, connection.port, nbytes, loop.time())
        self._to_worker(self._receive, raw, left_at)
        if link.holds_encoder:
            await loop.after(left_at + link.latency_s - loop.time())

    def end(self) -> None:
        self._to_worker(self._end, grpc.aio.EOF)

    def fail(self, error: VitrineError) -> None:
        self._to_worker(self._end, _error(STATUS_BY_CODE[error.code], str(error), error.code))

    def _to_worker(self, arrive: Callable[[T], None], message: T, left_at: float = 0.0) -> None:
        connection = self.connection
        sent_at = max(left_at, connection.loop.time())
        self._last_at = max(self._last_at, sent_at + connection.encoder.port.latency_s(connection.link))
        connection.to_worker(self._last_at, arrive, message)

    def stop(self) -> None:
        """Ends the encoder's work on it."""
        if self._serving is not None:
            self._serving.cancel()

    def _expire(self) -> None:
        self._end(_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        self.connection.to_encoder(self.stop)

    def lose(self) -> None:
        """The connection was lost."""
        self._end(_error(grpc.StatusCode.UNAVAILABLE, "the connection was lost"))

    def _serve(self, message: bytes, timeout_s: float) -> None:
        if not self._cancelled:
            connection = self.connection
            serving = connection.encoder.serve(self, message, timeout_s)
            self._serving = connection.loop.create_task(serving)
            connection.serving[self] = None
            self._serving.add_done_callback(lambda _: connection.serving.pop(self, None))

    def _receive(self, raw: bytes) -> None:
        if self._over is None:
            self._received.append(raw)
            self._wake()

    def _end(self, over: object) -> None:
        if self._over is None:
            self._over = over
            self._deadline.cancel()
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class SimulatedConnection:
    """One connection between a worker and an encoder, as long as it lasts. It is the worker's gRPC channel, too.

    A cut holds messages back, as TCP does, until it is healed or the connection is lost.
    """

    __slots__ = ("_held", "calls", "encoder", "holder", "is_alive", "is_cut", "link", "loop", "port", "serving")

    def __init__(self, loop: VirtualLoop, encoder: SimulatedEncoder, link: Link, port: Port, session_id: str) -> None:
        self.loop, self.encoder, self.link, self.port = loop, encoder, link, port
        self.holder = Holder(session_id.split(" ")[0], session_id)
        self.is_alive = True
        # Calls that the worker has open, and those that the encoder serves: dicts, as a set has no order.
        self.calls: dict[SimulatedCall, None] = {}
        self.serving: dict[SimulatedCall, None] = {}
        self.is_cut = False
        self._held: list[Callable[[], None]] = []

    def unary_stream(self, method: str, **codecs: object) -> Callable[..., SimulatedCall]:
        """As `grpc.aio.Channel.unary_stream`; there is one method."""
        return self._call

    def _call(self, message: bytes, *, timeout: float, metadata: object) -> SimulatedCall:
        call = SimulatedCall(self, message, timeout)
        self.calls[call] = None
        return call

    def to_encoder(self, arrive: Callable[[*Args], None], *message: *Args) -> None:
        self.loop.call_later(self.encoder.port.latency_s(self.link), self._arrive, arrive, *message)

    def to_worker(self, at: float, arrive: Callable[[*Args], None], *message: *Args) -> None:
        self.loop.call_at(at, self._arrive, arrive, *message)

    def cut(self) -> None:
        self.is_cut = True

    def heal(self) -> None:
        self.is_cut = False
        held, self._held = self._held, []
        for arrive in held:
            arrive()

    def lose(self) -> None:
        """Both sides have noticed that the connection is lost."""
        self.is_alive = False
        self._held.clear()
        for call in list(self.calls):
            call.lose()
        for call in list(self.serving):
            call.stop()
        self.encoder.close_session(self)

    def _arrive(self, arrive: Callable[[*Args], None], *message: *Args) -> None:
        if self.is_cut and self.is_alive:
            self._held.append(partial(self._arrive, arrive, *message))
        elif self.is_alive:
            arrive(*message)


class SimulatedPeer(EncoderPeer):
    """A worker's peer whose connections the fleet makes and breaks."""

    def __init__(
        self,
        loop: VirtualLoop,
        address: str,
        worker: str,
        port: Port,
        link: Link,
        rng: random.Random,
        on_item: Callable[[SimulatedPeer], None],
    ) -> None:
        """
        Args:
            on_item: called whenever an item is about to be sent to the encoder.
        """
        super().__init__(address, _OPTIONS, IDENTITY)
        self.simulated: SimulatedConnection | None = None
        self._on_item = on_item
        self._virtual, self._worker, self._port, self._link, self._rng = loop, worker, port, link, rng
        self._num_sessions = 0
        self._released: list[int] = []
        # What was read of calls that were not read to their end, by their ids.
        self._unread: dict[int, Collection[int]] = {}

    @property
    def is_idle(self) -> bool:
        """The fleet connects all."""
        return False

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @in_flight.setter
    def in_flight(self, number: int) -> None:
        if number > self._in_flight:
            self._on_item(self)
        EncoderPeer.in_flight.fset(self, number)  # type: ignore[attr-defined]  # mypy knows no setters of classes

    def open(self) -> None:
        """Does nothing, see `is_idle`."""

    def disconnect(self) -> None:
        """Does nothing: connections stay open."""

    async def close(self) -> None:
        self.lose()

    def release(self, session_id: str, lease_id: int) -> None:
        simulated = self.simulated
        if simulated is None or simulated.holder.session_id != session_id:
            self.num_leases -= 1  # the lease has ended with its session
            return
        self._flush_later(simulated)
        self._released.append(lease_id)

    def release_unread(self, session_id: str, call_id: int, read_lease_ids: Sequence[int]) -> None:
        simulated = self.simulated
        if simulated is not None and simulated.holder.session_id == session_id:
            self._flush_later(simulated)
            self._unread[call_id] = read_lease_ids

    def connect(self, encoder: SimulatedEncoder) -> None:
        """Connects to a process of the encoder that is up and reachable, if it serves the worker's checkpoint."""
        try:
            check_identity(self.address, encoder.description.identity, IDENTITY)
        except EncoderMismatch as error:
            self.error = error
            self.attempted.set()
            self._on_change()
            return
        self._num_sessions += 1
        session_id = f"{self._worker} {self._num_sessions}"
        self.simulated = simulated = SimulatedConnection(self._virtual, encoder, self._link, self._port, session_id)
        encoder.open_session(simulated)
        channel = cast("grpc.aio.Channel", simulated)
        self.connection = Connection(channel, encoder.description, session_id, "cuda_ipc", encoder.mapping)
        self.has_session = True
        self.attempted.set()
        self._on_change()

    def reconnect_later(self, encoder: SimulatedEncoder, may_connect: Callable[[], bool]) -> None:
        """Connects after a part of the backoff, if it may by then."""
        self._virtual.call_later(
            self._rng.uniform(*_RECONNECT_S),
            lambda: self.connect(encoder) if self.simulated is None and may_connect() else None,
        )

    def drain(self) -> None:
        """The encoder drains: no further item is sent to it, and what is in flight goes on."""
        self.connection = None
        self._on_change()

    def lose_process(self, encoder: SimulatedEncoder) -> None:
        """Loses the connection to this process, if there is one."""
        if self.simulated is not None and self.simulated.encoder is encoder:
            self.lose()

    def lose_cut(self, simulated: SimulatedConnection) -> None:
        """Loses this connection, if it is still the peer's and still cut."""
        if self.simulated is simulated and simulated.is_cut:
            self.lose()

    def lose(self) -> None:
        """The connection is lost; without one it does nothing."""
        simulated, self.simulated = self.simulated, None
        self.connection, self.has_session = None, False
        self.attempted.set()
        if simulated is not None:
            self.error = self.unavailable(f"encoder {self.address} was lost")
            self._on_change()
            self.num_leases -= len(self._released)
            self._released.clear()
            self._unread.clear()
            simulated.lose()

    def _flush_later(self, simulated: SimulatedConnection) -> None:
        if not self._released and not self._unread:
            self._virtual.call_later(_RELEASE_BATCH_S, self._flush, simulated)

    def _flush(self, simulated: SimulatedConnection) -> None:
        if self.simulated is simulated:
            lease_ids, self._released = self._released, []
            unread, self._unread = self._unread, {}
            self.num_leases -= len(lease_ids)
            leases, session_id = simulated.encoder.leases, simulated.holder.session_id

            def release() -> None:
                leases.release(session_id, lease_ids)
                if unread:
                    leases.release_unread(session_id, unread)

            simulated.to_encoder(release)


_OPTIONS = ConnectOptions(transport="cuda_ipc")


def _error(status: grpc.StatusCode, details: str, code: str = "") -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata((ERROR_CODE_KEY, code)) if code else grpc.aio.Metadata()
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), trailing, details)
