"""Fetches rows in the background: a thread whose event loop has the client of encoders and the worker channel.

The scheduler of vLLM only leaves orders here and collects results; no method that it calls after `start` blocks.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.clients.encoder_peer import DescriptionCheck
from vitrine_vlm.embedding_transport.fleet.discovery import parse_sources, watch_sources
from vitrine_vlm.embedding_transport.fleet.peer_fleet import ALL_CONNECTED
from vitrine_vlm.embedding_transport.receiving.received_rows import HostRows, LeasedRows
from vitrine_vlm.errors import (
    EncoderUnavailable,
    InternalError,
    LeaseExpired,
    PlaceholderMismatch,
    VitrineError,
    as_vitrine_error,
)
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import EmbeddingRows, LayoutEvent, MediaItem
from vitrine_vlm.vllm_connector.messages import Rows
from vitrine_vlm.vllm_connector.settings import ConnectorSettings
from vitrine_vlm.vllm_connector.worker_hub import RemoteMapper, RemoteMapping, WorkerHub

_WORKERS_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowFormat:
    """`dtype` is a name of DTYPES; `row_width` is the number of elements in one row."""

    dtype: str
    row_width: int


@dataclass(frozen=True)
class FetchOrder:
    """Rows to fetch.

    delivery_id: never used twice.
    num_tokens: the rows that vLLM's placeholders need.
    make_item: returns the item; called on the fetching thread, as it may copy large patches.

    Raises (make_item): VitrineError: the item cannot be made.
    """

    delivery_id: int
    request_id: str
    tenant: str
    num_tokens: int
    make_item: Callable[[], MediaItem]


@dataclass(frozen=True)
class FetchResult:
    """The rows of a delivery have landed in all workers, or `error` says why not.

    transport, nbytes: how they came, and their size in one worker.
    seconds: from the order to the last worker's answer.
    """

    delivery_id: int
    seconds: float
    error: VitrineError | None = None
    transport: str = ""
    nbytes: int = 0


class Fetcher:
    """Belongs to the thread of vLLM's scheduler, but for what runs on its own thread.

    Args:
        row_format: the rows that vLLM's model needs.
        num_workers: the vLLM workers that rows land in.
        socket_path: of the worker channel.
        check: refuses encoders that cannot serve vLLM's model.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        row_format: RowFormat,
        num_workers: int,
        socket_path: Path,
        check: DescriptionCheck,
    ) -> None:
        self._settings, self._row_format, self._check = settings, row_format, check
        self._num_workers, self._socket_path = num_workers, socket_path
        self._open: set[int] = set()
        self._results: queue.SimpleQueue[FetchResult] = queue.SimpleQueue()
        self._started: Future[None] = Future()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vitrine fetching", daemon=True)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._discards: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Waits for vLLM's workers and for the first attempt to connect to each encoder.

        Raises:
            VitrineError: an encoder that answers cannot serve vLLM's model, or a worker has not connected.
            OSError: the socket cannot be made.
        """
        self._thread.start()
        self._started.result()

    def close(self) -> None:
        self._call(self._stop)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def fetch(self, order: FetchOrder) -> None:
        """Starts to fetch rows; `take_results` has the result."""
        self._open.add(order.delivery_id)
        self._call(lambda: self._start_fetch(order))

    def cancel(self, delivery_id: int) -> None:
        """Ends the fetch, and frees what has landed. Its result may be on its way already."""
        self._open.discard(delivery_id)
        self._call(lambda: self._cancel_fetch(delivery_id))

    def discard(self, delivery_id: int) -> None:
        """Frees rows that have landed and that no step was asked to load."""
        self._call(lambda: self._start_discard(delivery_id))

    def take_results(self) -> list[FetchResult]:
        results: list[FetchResult] = []
        ended = self._ended.is_set()  # before the queue is read: what it holds then is the last of it
        while True:
            try:
                results.append(self._results.get_nowait())
            except queue.Empty:
                break
        self._open.difference_update(result.delivery_id for result in results)
        if ended:
            error = EncoderUnavailable("the connector's fetching thread has ended, see the log of vLLM's EngineCore")
            results += [FetchResult(delivery_id, 0.0, error) for delivery_id in sorted(self._open)]
            self._open.clear()
        return results

    def _call(self, function: Callable[[], None]) -> None:
        with suppress(RuntimeError, AttributeError):  # the loop is closed or was never there; see take_results
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                _log.exception("the connector's fetching thread has failed: no more rows are fetched")
            else:
                self._started.set_exception(error)
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        settings, supervisor = self._settings, Supervisor()
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._hub = WorkerHub(self._num_workers, Path(settings.shm_folder), supervisor)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(supervisor.close)
            stack.push_async_callback(self._hub.close)
            await self._hub.listen(self._socket_path)
            device = await self._hub.wait_connected(_WORKERS_TIMEOUT_S)
            self._client = EncoderClient(
                [],
                None,
                transport=settings.transport,
                shm_folder=Path(settings.shm_folder),
                connect_timeout_s=settings.connect_timeout_s,
                encode_timeout_s=settings.encode_timeout_s,
                gpu=torch.device(device) if device == "cuda" else None,
                tls=settings.encoder_tls(),
                supervisor=supervisor,
                mapper=RemoteMapper(self._hub, settings.connect_timeout_s),
                check=self._check,
                connections=ALL_CONNECTED,  # a ticket names the process of an encoder
            )
            stack.push_async_callback(self._client.close)
            await self._discover(supervisor)
            await self._client.start()
            self._started.set_result(None)
            await self._stopped.wait()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), *self._discards, return_exceptions=True)

    async def _discover(self, supervisor: Supervisor) -> None:
        """Keeps the client's addresses up to date; returns once some are known, or after `connect_timeout_s`."""
        found = asyncio.Event()

        def use(addresses: list[str]) -> None:
            self._client.set_addresses(addresses)
            found.set()

        supervisor.start_job("discovery", watch_sources(parse_sources(self._settings.encoders), use))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await supervisor.unless_failed(found.wait())

    def _stop(self) -> None:
        self._stopped.set()

    def _start_fetch(self, order: FetchOrder) -> None:
        task = asyncio.create_task(self._fetch(order))
        self._tasks[order.delivery_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(order.delivery_id, None))

    def _cancel_fetch(self, delivery_id: int) -> None:
        task = self._tasks.get(delivery_id)
        if task is not None:
            task.cancel()

    def _start_discard(self, delivery_id: int) -> None:
        task = asyncio.create_task(_quietly(self._hub.discard(delivery_id)))
        self._discards.add(task)
        task.add_done_callback(self._discards.discard)

    async def _fetch(self, order: FetchOrder) -> None:
        start = time.perf_counter()
        try:
            for attempt in range(2):
                try:
                    transport, nbytes = await self._land_rows(order)
                    break
                except LeaseExpired:  # a stall; the encoder has the rows in its cache
                    if attempt:
                        raise
        except asyncio.CancelledError:
            self._start_discard(order.delivery_id)  # workers carry it out behind a copy that is in flight
            raise
        except Exception as error:
            self._start_discard(order.delivery_id)  # some of the workers may have the rows
            seconds = time.perf_counter() - start
            self._results.put(FetchResult(order.delivery_id, seconds, as_vitrine_error(error)))
        else:
            seconds = time.perf_counter() - start
            self._results.put(FetchResult(order.delivery_id, seconds, None, transport, nbytes))

    async def _land_rows(self, order: FetchOrder) -> tuple[str, int]:
        """Returns the transport and the bytes of the rows, once all workers have them.

        Raises:
            VitrineError: they could not be fetched or landed.
        """
        item = order.make_item()
        landed: tuple[str, int] | None = None
        async with aclosing(self._client.encode([item], order.request_id, order.tenant)) as events:
            async for event in events:
                if isinstance(event, LayoutEvent):
                    if event.layout.num_tokens != order.num_tokens:
                        raise PlaceholderMismatch(
                            f"the encoder makes {event.layout.num_tokens} rows of grid {event.layout.grid_thw}, vLLM's "
                            f"prompt has {order.num_tokens} places for them"
                        )
                    continue
                try:
                    landed = await self._land(order, event.rows)
                finally:
                    event.rows.release()
        # The call is read to its end: closed earlier, the encoder would count the item as cancelled.
        if landed is None:
            raise InternalError("the encoder's answer ended without rows")
        return landed

    async def _land(self, order: FetchOrder, received: EmbeddingRows) -> tuple[str, int]:
        form = self._row_format
        rows = Rows(
            delivery_id=order.delivery_id,
            num_tokens=order.num_tokens,
            row_width=form.row_width,
            dtype=form.dtype,  # type: ignore[arg-type]  # checked by pydantic
        )
        if isinstance(received, LeasedRows) and isinstance(received.mapping, RemoteMapping):
            mapping = received.mapping
            await self._hub.land(mapping.pool_id, rows, received.lease)
            return mapping.transport, rows.nbytes
        assert isinstance(received, HostRows)
        await self._hub.land_bytes(rows, received.rows_TW)
        return "grpc", rows.nbytes


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    """Runs work whose failure means that there is nothing left to do: the worker is gone."""
    with suppress(VitrineError):
        await work
