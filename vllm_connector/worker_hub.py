"""The scheduler's end of the worker channel: it sends each request to all workers and collects their answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from vitrine_vlm.embedding_transport.pools.pool import PoolMapping, PoolSource
from vitrine_vlm.errors import TransportUnavailable, error_from_code
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.vllm_connector.messages import (
    LENGTHS,
    Answer,
    Command,
    Discard,
    Hello,
    Land,
    LandBytes,
    Map,
    Request,
    Rows,
    Unmap,
    pack_frame,
    unpack_lengths,
)

_HELLO_TIMEOUT_S = 5.0
_NO_PAYLOAD = memoryview(b"")

_log = logging.getLogger(__name__)


class WorkerHub:
    """All workers that need rows. It belongs to one event loop; only `map` of its mapper is called in other threads.

    Args:
        num_workers: how many workers there are: the ranks of the first pipeline stage.
        shm_folder: the shared-memory folder, the same as the encoders'.
        supervisor: owns what reads the workers' answers.
    """

    def __init__(self, num_workers: int, shm_folder: Path, supervisor: Supervisor) -> None:
        self.shm_folder = shm_folder
        self._supervisor = supervisor
        self._num_workers = num_workers
        self._workers: dict[int, _Worker] = {}
        self._connected = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._failure = ""

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._accept, path)

    async def wait_connected(self, timeout_s: float) -> str:
        """Waits for all workers and returns their type of device.

        Raises:
            TransportUnavailable: not all have connected in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise TransportUnavailable(
                f"{len(self._workers)} of {self._num_workers} vLLM workers have connected to the scheduler's process "
                f"within {timeout_s:g} s; workers on other hosts are not supported"
            ) from None
        return next(iter(self._workers.values())).device

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for worker in self._workers.values():
            worker.close()

    async def map(self, pool_id: int, source: PoolSource, probe_offset: int, probe_nbytes: int) -> bytes:
        """Has all workers map a pool; returns the nonce that all have read.

        Raises:
            TransportUnavailable: a worker cannot map it, or has read something else than the others.
        """
        command = Map(pool_id=pool_id, source=source, probe_offset=probe_offset, probe_nbytes=probe_nbytes)
        nonces = {answer.nonce for answer in await self._ask_all(command)}
        if len(nonces) != 1:
            raise TransportUnavailable(f"vLLM's workers have read {len(nonces)} different nonces of one pool")
        return bytes.fromhex(nonces.pop())

    async def land(self, pool_id: int, rows: Rows, lease: encoder_pb2.Lease) -> None:
        """Has all workers copy leased rows; returns once all have.

        Raises:
            LeaseExpired: the encoder has released the rows.
            VitrineError: a worker could not copy them.
        """
        command = Land(
            pool_id=pool_id, rows=rows, lease_id=lease.lease_id, generation=lease.generation, offset=lease.offset
        )
        await self._ask_all(command)

    async def land_bytes(self, rows: Rows, host_TW: torch.Tensor) -> None:
        """Sends rows to all workers; returns once all have them on their devices.

        Args:
            host_TW: the rows in host memory, contiguous.

        Raises:
            VitrineError: a worker could not keep them.
        """
        await self._ask_all(LandBytes(rows=rows), memoryview(host_TW.view(torch.uint8).flatten().numpy()))  # type: ignore[arg-type]

    async def discard(self, delivery_id: int) -> None:
        await self._ask_all(Discard(delivery_id=delivery_id))

    def start_unmap(self, pool_id: int) -> None:
        """Has all workers unmap a pool, in the background."""
        self._supervisor.start_job("unmapping a pool", self._unmap(pool_id))

    async def _unmap(self, pool_id: int) -> None:
        with suppress(TransportUnavailable):  # the worker is gone, and with it what it had mapped
            await self._ask_all(Unmap(pool_id=pool_id))

    async def _ask_all(self, command: Command, payload: memoryview = _NO_PAYLOAD) -> list[Answer]:
        if self._failure:
            raise TransportUnavailable(self._failure)
        answers = await asyncio.gather(
            *(worker.ask(command, payload) for worker in self._workers.values()), return_exceptions=True
        )
        good: list[Answer] = []
        for answer in answers:  # after all have answered: none of them still copies then
            if isinstance(answer, BaseException):
                raise answer
            if answer.error:
                raise error_from_code(answer.code, answer.error)
            good.append(answer)
        return good

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._supervisor.start_job("worker channel", self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads the answers of one worker until it disconnects."""
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = Hello.model_validate_json(await _read_frame(reader))
            if hello.rank in self._workers or hello.rank >= self._num_workers:
                raise ValueError(f"rank {hello.rank} of {self._num_workers} connected twice or does not exist")
        except EOFError:  # another engine looked whether this one is alive
            writer.close()
            return
        except (OSError, ValueError) as error:
            _log.warning("a connection on the worker channel was refused: %s", error)
            writer.close()
            return
        worker = self._workers[hello.rank] = _Worker(hello.device, writer)
        if len(self._workers) == self._num_workers:
            self._connected.set()
        reason = "it has closed the channel"
        try:
            while True:
                worker.receive(Answer.model_validate_json(await _read_frame(reader)))
        except EOFError:
            pass
        except (OSError, ValueError) as error:
            reason = str(error)
        finally:
            # Rows must land in all workers or in none: without this one nothing can be fetched any more.
            self._failure = f"vLLM's worker {hello.rank} cannot be reached: {reason}"
            for each in self._workers.values():
                each.fail(self._failure)
            writer.close()


class RemoteMapping(PoolMapping):
    """A pool that the workers have mapped, and this process has not.

    pool_id: names it on the worker channel.
    transport: by which its rows are read: "cuda_ipc" or "shm".
    """

    def __init__(
        self, pool_id: int, transport: str, nbytes: int, probe_offset: int, nonce: bytes, source: PoolSource
    ) -> None:
        super().__init__(nbytes)
        self.pool_id, self.transport = pool_id, transport
        self._probe_offset, self._nonce, self._source = probe_offset, nonce, source

    def source(self) -> PoolSource:
        return self._source

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        if (offset, nbytes) != (self._probe_offset, len(self._nonce)):
            raise TransportUnavailable("only workers can read this pool")
        return self._nonce

    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor without memory: the rows are read by the workers."""
        return torch.empty(shape, dtype=dtype, device="meta")


class RemoteMapper:
    """Maps offered pools in all workers (see `pool_mapper.PoolMapper`). Create it on the hub's event loop."""

    def __init__(self, hub: WorkerHub, timeout_s: float) -> None:
        self._hub, self._timeout_s = hub, timeout_s
        self._loop = asyncio.get_running_loop()
        self._pool_ids = itertools.count()

    def map(self, offer: encoder_pb2.Offer) -> RemoteMapping:
        source: PoolSource
        if offer.WhichOneof("pool") == "cuda_ipc":
            pool: encoder_pb2.CudaIpcPool | encoder_pb2.ShmPool = offer.cuda_ipc
            source = {"handle": offer.cuda_ipc.handle.hex(), "nbytes": pool.nbytes, "uuid": offer.cuda_ipc.gpu_uuid}
        else:
            pool = offer.shm
            source = {"folder": str(self._hub.shm_folder), "name": offer.shm.name, "nbytes": pool.nbytes}
        pool_id = next(self._pool_ids)
        mapping = self._hub.map(pool_id, source, pool.probe_offset, pool.probe_nbytes)
        try:
            nonce = asyncio.run_coroutine_threadsafe(mapping, self._loop).result(self._timeout_s)
        except BaseException:
            self._unmap(pool_id)  # some of the workers may have mapped it
            raise
        mapped = RemoteMapping(pool_id, offer.transport, pool.nbytes, pool.probe_offset, nonce, source)
        weakref.finalize(mapped, self._unmap, pool_id)
        return mapped

    def _unmap(self, pool_id: int) -> None:
        """Unmaps a pool in all workers, once this process refers to it no more; callable from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and the channel with it
            self._loop.call_soon_threadsafe(self._hub.start_unmap, pool_id)


class _Worker:
    """One connected worker and the requests that it has not answered yet."""

    def __init__(self, device: str, writer: asyncio.StreamWriter) -> None:
        self.device = device
        self._writer = writer
        self._numbers = itertools.count()
        self._unanswered: dict[int, asyncio.Future[Answer]] = {}

    async def ask(self, command: Command, payload: memoryview) -> Answer:
        """Sends a command and waits for its answer. The worker carries out commands in the order of these calls.

        Raises:
            TransportUnavailable: the worker has disconnected.
        """
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._unanswered[number] = answer
        try:
            self._writer.write(pack_frame(Request(number=number, command=command), payload.nbytes))
            if payload.nbytes:
                self._writer.write(payload)
            await self._writer.drain()
            return await answer
        except OSError as error:
            raise TransportUnavailable(f"a vLLM worker cannot be reached: {error}") from error
        finally:
            self._unanswered.pop(number, None)

    def receive(self, answer: Answer) -> None:
        """Passes an answer to the call that waits for it, if that was not cancelled meanwhile."""
        waiting = self._unanswered.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def fail(self, reason: str) -> None:
        for waiting in self._unanswered.values():
            if not waiting.done():
                waiting.set_exception(TransportUnavailable(reason))

    def close(self) -> None:
        self._writer.close()


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    """Returns the next frame's header; workers send no payload.

    Raises:
        EOFError: the worker has closed the channel.
        ValueError: a length is too large.
    """
    header_nbytes, payload_nbytes = unpack_lengths(await reader.readexactly(LENGTHS.size))
    if payload_nbytes:
        raise ValueError(f"a worker sent a payload of {payload_nbytes} bytes")
    return await reader.readexactly(header_nbytes)
