"""The client's side of a service that ships rows: a connection that is opened when needed, and leases held over it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

import grpc
import torch

from vitrine_vlm.embedding_transport.fleet.content_routing import address_hash
from vitrine_vlm.embedding_transport.fleet.pool_mapper import LocalMapper, PoolMapper
from vitrine_vlm.embedding_transport.pools.pool import PoolMapping
from vitrine_vlm.embedding_transport.wire.grpc_status import error_from_rpc
from vitrine_vlm.errors import TransportUnavailable, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.service_runtime.cancellation import is_own_cancellation
from vitrine_vlm.service_runtime.grpc_channel import open_channel
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tls import ClientTls
from vitrine_vlm.types import PROTOCOL_VERSION

TransportChoice = Literal["auto", "cuda_ipc", "shm", "grpc"]
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_FLUSH_TIMEOUT_S = 1.0
# Leases released within this time are sent in one call: a call costs each side half as much CPU time as an Encode.
_RELEASE_BATCH_S = 0.01

_log = logging.getLogger(__name__)


DescriptionT = TypeVar("DescriptionT")
# What ends leases of a session: the id of one, or a call whose leases were not all read.
_Release: TypeAlias = int | encoder_pb2.UnreadCall


class RowStub(Protocol):
    """The calls that all services which ship rows have in common; the messages are the encoder's."""

    @property
    def Connect(
        self,
    ) -> grpc.aio.StreamStreamMultiCallable[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]: ...

    @property
    def Release(
        self,
    ) -> grpc.aio.UnaryUnaryMultiCallable[encoder_pb2.ReleaseRequest, encoder_pb2.ReleaseResponse]: ...


@dataclass(frozen=True)
class Connection(Generic[DescriptionT]):
    """A connected service: its description, the negotiated session, and its mapped pool, if it ships rows in one."""

    channel: grpc.aio.Channel
    description: DescriptionT
    session_id: str
    transport: str
    mapping: PoolMapping | None


@dataclass(frozen=True)
class ConnectOptions:
    """How a client connects.

    transport: "auto" uses the best transport that works; another value is the only transport to accept.
    shm_folder: the shared-memory folder, the same as the service's.
    connect_timeout_s: seconds for each step of connecting.
    gpu: the GPU on which rows are landed; without one "auto" leaves out CUDA IPC.
    tls: its files are read again for every connection; None for no TLS.
    mapper: maps the pools; by default this process does.
    """

    transport: TransportChoice = "auto"
    shm_folder: Path = Path("/dev/shm")
    connect_timeout_s: float = 5.0
    gpu: torch.device | None = None
    tls: ClientTls | None = None
    mapper: PoolMapper | None = None

    @property
    def transports(self) -> list[str]:
        """The accepted transports, best first."""
        on_host = ["shm", "grpc"]
        if self.transport != "auto":
            return [self.transport]
        return ["cuda_ipc", *on_host] if self.gpu is not None else on_host


@dataclass
class InFlightCount:
    """What is in flight on several peers together."""

    total: int = 0


class RowPeer(ABC, Generic[DescriptionT]):
    """Connects to one service and releases its leases. It belongs to one event loop.

    It is idle until `open`, which connects, and connects again after a loss, until `disconnect` or `close`.

    service: the kind of service, for messages.
    unavailable: the error for a service that cannot be reached.
    connection: for new requests; None while the service is not connected or drains.
    description: that of the current connection, or of the last one.
    has_session: whether requests in flight and leases are still valid, also while the service drains.
    attempted: set once the first attempt since the peer was idle has ended.
    in_flight: items or requests that the service is working on for this client.
    used_at: when it was connected, or `in_flight` has last changed, on the clock of the event loop, seconds.
    address_hash: the address's part in routing.
    counted_in: a fleet's count of what is in flight on the peers that can be used; None where this one cannot be.
    num_leases: leases that this client holds and has not released.
    """

    service: ClassVar[str]
    unavailable: ClassVar[type[VitrineError]]

    def __init__(self, address: str, options: ConnectOptions) -> None:
        self.address = address
        self.address_hash = address_hash(address)
        self.counted_in: InFlightCount | None = None
        self._in_flight = 0
        self.num_leases = 0
        self.num_fallbacks = 0
        self.used_at = 0.0
        self.connection: Connection[DescriptionT] | None = None
        self.description: DescriptionT | None = None
        self.has_session = False
        self.error: VitrineError = self._not_connected()
        self.attempted = asyncio.Event()
        self._transports = options.transports
        self._options = options
        self._mapper = options.mapper or LocalMapper(options.shm_folder, options.gpu)
        self._call_ids = itertools.count(1)
        self._on_change: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_closed = False
        # Of the connection that was idle: one that is opened again with the same is no further fallback.
        self._last_transport: str | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it is neither connected nor connects."""
        return self._task is None

    @property
    def is_usable(self) -> bool:
        """Whether requests may be sent to it: it is connected, or may be once it is tried."""
        return self.connection is not None or not self.attempted.is_set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @in_flight.setter
    def in_flight(self, number: int) -> None:
        if self.counted_in is not None:
            self.counted_in.total += number - self._in_flight
        self._in_flight = number
        self.used_at = self._loop.time()

    def start(self, on_change: Callable[[], None], supervisor: Supervisor) -> None:
        """
        Args:
            on_change: called whenever the peer begins to connect, has connected, was lost, or has become idle.
            supervisor: owns the tasks of the connection.
        """
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._supervisor = supervisor
        self._to_release: asyncio.Queue[tuple[str, _Release]] = asyncio.Queue()

    def open(self) -> None:
        """Connects if the peer is idle."""
        if self.is_idle and not self._is_closed:
            name = f"{self.service} {self.address} connection"
            self._task = self._supervisor.start_task(name, self._keep_connected())
            self._on_change()

    async def connected(self, timeout_s: float | None) -> Connection[DescriptionT]:
        """Returns the connection; an idle peer is connected first.

        Args:
            timeout_s: the longest wait for that; None for no limit but that of the steps of connecting.

        Raises:
            VitrineError: `unavailable`: the peer could not be connected to, or was lost.
        """
        self.open()
        if self.connection is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self.attempted.wait()
        if self.connection is None:
            raise self.unavailable(str(self.error))
        return self.connection

    def disconnect(self) -> None:
        """Makes a peer idle; call it only where nothing is in flight and no lease is held."""
        if self._task is None:
            return
        self._supervisor.expect_end(self._task)
        self._task.cancel()
        self._task, self._ending = None, self._task
        self.has_session = False
        self.connection = None
        self.error = self._not_connected()
        self.attempted.clear()
        self._on_change()

    async def close(self) -> None:
        """Disconnects for good."""
        self._is_closed = True
        await self._supervisor.stop(*(task for task in (self._task, self._ending) if task is not None))
        self.attempted.set()

    def release(self, session_id: str, lease_id: int) -> None:
        """Releases a lease in the background; callable from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and the session with it
            self._loop.call_soon_threadsafe(self._to_release.put_nowait, (session_id, lease_id))

    def new_call_id(self) -> int:
        """Returns an id for a call, another one each time."""
        return next(self._call_ids)

    def release_unread(self, session_id: str, call_id: int, read_lease_ids: Sequence[int]) -> None:
        """Releases, in the background, the leases of a call that was not read to its end, except those that were read.

        The call must be cancelled already. Services from before call ids ignore it.
        """
        if self.has_session:  # otherwise they have ended with it
            call = encoder_pb2.UnreadCall(call_id=call_id, read_lease_ids=read_lease_ids)
            self._to_release.put_nowait((session_id, call))

    @abstractmethod
    async def _describe(self, channel: grpc.aio.Channel) -> DescriptionT:
        """Calls the service's Describe.

        Raises:
            VitrineError: the service does not serve what this client needs.
        """

    @abstractmethod
    def _stub(self, channel: grpc.aio.Channel) -> RowStub: ...

    async def _keep_connected(self) -> None:
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while True:
            async with AsyncExitStack() as stack:
                try:
                    channel = open_channel(self.address, self._options.tls)
                    await stack.enter_async_context(channel)
                    await self._serve_connection(channel)
                except VitrineError as error:
                    self._report(error)
                except grpc.aio.AioRpcError as error:
                    named = error_from_rpc(error)
                    self._report(named or self.unavailable(f"{self.service} {self.address}: {error.details()}"))
                except TimeoutError:
                    self._report(self.unavailable(f"{self.service} {self.address} did not answer in time"))
                except OSError as error:  # a certificate file cannot be read
                    self._report(self.unavailable(f"{self.service} {self.address} cannot be connected to: {error}"))
                except (asyncio.InvalidStateError, grpc.aio.BaseError):  # grpc raises these for a call that has ended
                    self._report(self.unavailable(f"{self.service} {self.address} ended the connection"))
                except asyncio.CancelledError:
                    if is_own_cancellation():
                        raise
                    self._report(self.unavailable(f"{self.service} {self.address} cancelled the connection"))
                except Exception as error:
                    if self.has_session:  # a bug in this client
                        raise
                    # The service breaks the protocol, or its pool cannot be mapped.
                    self._report(self.unavailable(f"{self.service} {self.address} cannot be connected to: {error!r}"))
                finally:
                    if self._task is asyncio.current_task():  # otherwise a later one has the peer
                        if self.has_session:
                            backoff.reset()
                        self.has_session = False
                        self.connection = self._last_transport = None
                        self.attempted.set()
                        self._on_change()
            await backoff.pause()

    def _not_connected(self) -> VitrineError:
        return self.unavailable(f"{self.service} {self.address} is not connected yet")

    def _report(self, error: VitrineError) -> None:
        if str(error) != str(self.error):
            _log.warning("%s", error)
        self.error = error

    async def _serve_connection(self, channel: grpc.aio.Channel) -> None:
        """Connects; returns when the service ends the session."""
        async with asyncio.timeout(self._options.connect_timeout_s):
            description = await self._describe(channel)
        stub = self._stub(channel)
        call = stub.Connect()
        try:
            async with asyncio.timeout(self._options.connect_timeout_s):
                session, mapping = await self._negotiate(call)
            self.connection = Connection(channel, description, session.session_id, session.transport, mapping)
            self.description = description
            self.has_session = True
            self.used_at = self._loop.time()
            # Reported once the service drains, and after an orderly end.
            self.error = self.unavailable(f"{self.service} {self.address} is shutting down")
            _log.info("connected to %s %s, transport %s", self.service, self.address, session.transport)
            self.attempted.set()
            self._on_change()
            name = f"{self.service} {self.address} releases"
            releasing = self._supervisor.start_task(name, self._release_leases(stub))
            try:
                response = await call.read()
                if isinstance(response, encoder_pb2.ConnectResponse) and response.WhichOneof("message") == "draining":
                    self.connection = None
                    self._on_change()
                    await call.read()
            finally:
                await self._supervisor.stop(releasing)
                await self._flush_releases(stub)
        finally:
            call.cancel()

    async def _negotiate(
        self, call: grpc.aio.StreamStreamCall[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse]
    ) -> tuple[encoder_pb2.Session, PoolMapping | None]:
        hello = encoder_pb2.Hello(protocol_version=PROTOCOL_VERSION, transports=self._transports)
        await call.write(encoder_pb2.ConnectRequest(hello=hello))
        response = await _read(call)
        mapping: PoolMapping | None = None
        offered = ""
        while response.WhichOneof("message") == "offer":
            offered = response.offer.transport
            mapping, result = await asyncio.to_thread(self._probe, response.offer)
            await call.write(encoder_pb2.ConnectRequest(probe_result=result))
            response = await _read(call)
        if response.WhichOneof("message") != "session":
            raise TransportUnavailable(f"{self.service} {self.address} answered with {response.WhichOneof('message')}")
        transport = response.session.transport
        possible = {"grpc"} if mapping is None else {"grpc", offered}
        if transport not in possible & set(self._transports):
            raise TransportUnavailable(
                f"{self.service} {self.address} would send rows by {transport!r}; this client accepts "
                f"{' or '.join(self._transports)}"
            )
        if transport not in (self._transports[0], self._last_transport):
            self.num_fallbacks += 1
            wanted = self._transports[0]
            _log.warning("no %s with %s %s: rows come by %s", wanted, self.service, self.address, transport)
        self._last_transport = transport
        return response.session, mapping if transport != "grpc" else None

    def _probe(self, offer: encoder_pb2.Offer) -> tuple[PoolMapping | None, encoder_pb2.ProbeResult]:
        """Maps the offered pool and reads its nonce. Blocks.

        Raises:
            TransportUnavailable: the pool cannot be mapped, and no other transport is accepted.
        """
        try:
            mapping = self._mapper.map(offer)
            is_shm = offer.WhichOneof("pool") == "shm"
            pool: encoder_pb2.ShmPool | encoder_pb2.CudaIpcPool = offer.shm if is_shm else offer.cuda_ipc
            return mapping, encoder_pb2.ProbeResult(nonce=mapping.read_probe(pool.probe_offset, pool.probe_nbytes))
        except Exception as error:  # CUDA raises many types; the next transport may work
            reason = str(error) if isinstance(error, TransportUnavailable) else repr(error)
            if len(self._transports) == 1:
                raise TransportUnavailable(f"{self.service} {self.address}: {reason}") from error
            return None, encoder_pb2.ProbeResult(error=reason)

    async def _release_leases(self, stub: RowStub) -> None:
        while True:
            first = await self._to_release.get()
            self._to_release.put_nowait(first)
            await asyncio.sleep(_RELEASE_BATCH_S)
            await self._flush_releases(stub)

    async def _flush_releases(self, stub: RowStub) -> None:
        by_session: dict[str, encoder_pb2.ReleaseRequest] = {}
        while not self._to_release.empty():
            session_id, release = self._to_release.get_nowait()
            request = by_session.setdefault(session_id, encoder_pb2.ReleaseRequest(session_id=session_id))
            if isinstance(release, int):
                request.lease_ids.append(release)
            else:
                request.unread_calls.append(release)
        while by_session:
            session_id, request = by_session.popitem()
            try:
                await stub.Release(request, timeout=_FLUSH_TIMEOUT_S)
            except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:  # UsageError: the channel is closed already
                _log.debug("release failed; the leases end with the session or expire: %s", error)
            except asyncio.CancelledError:
                by_session[session_id] = request
                for each, unreleased in by_session.items():  # the last flush sends them again
                    releases: list[_Release] = [*unreleased.lease_ids, *unreleased.unread_calls]
                    for release in releases:
                        self._to_release.put_nowait((each, release))
                raise
            self.num_leases -= len(request.lease_ids)


async def _read(
    call: grpc.aio.StreamStreamCall[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse],
) -> encoder_pb2.ConnectResponse:
    response = await call.read()
    if not isinstance(response, encoder_pb2.ConnectResponse):  # end of the stream
        code, details = await call.code(), await call.details()
        raise TransportUnavailable(f"the other side ended the connection: {code.name} {details}")
    return response
