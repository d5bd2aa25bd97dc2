"""Batches the JPEGs that a GPU decodes.

A thread takes all JPEGs that wait, decodes them in one call, and waits for the GPU once at the end. A thread for each
JPEG would contend for the interpreter and for the decoder, and wait for the GPU as often as there are JPEGs. There are
two threads, so that one begins while the other waits for the GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia
from vitrine_vlm.service_runtime.supervisor import Supervisor

# A larger batch is no faster, and each of its items waits for all of it.
_MAX_BATCH_ITEMS = 16
_NUM_THREADS = 2

Result = torch.Tensor | Exception


class JpegBatcher:
    """Makes patches of JPEGs in batches. It belongs to one event loop.

    Args:
        compute: patches of each item, or the exception that it raised; called on one of two threads.
    """

    def __init__(self, compute: Callable[[Sequence[OpenedMedia]], list[Result]]) -> None:
        self._compute = compute
        self._waiting: asyncio.Queue[tuple[OpenedMedia, asyncio.Future[torch.Tensor]]] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="encoder-jpeg")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, supervisor: Supervisor) -> None:
        """Starts one loop a thread, which the supervisor owns."""
        self._supervisor = supervisor
        self._tasks = [
            supervisor.start_task(f"jpeg batcher {index}", self._run_batches()) for index in range(_NUM_THREADS)
        ]

    async def close(self) -> None:
        """Discards what has not begun and waits for the rest."""
        if self._tasks:
            await self._supervisor.stop(*self._tasks)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def patches(self, opened: OpenedMedia) -> torch.Tensor:
        """See `OpenedMedia.patches`; an item that is cancelled before its batch begins is not decoded."""
        patches: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((opened, patches))
        return await patches

    async def _run_batches(self) -> None:
        while True:
            popped = [await self._waiting.get()]
            while len(popped) < _MAX_BATCH_ITEMS and not self._waiting.empty():
                popped.append(self._waiting.get_nowait())
            batch = [(opened, patches) for opened, patches in popped if not patches.done()]
            if not batch:  # all were cancelled
                continue
            results = await self._run_batch([opened for opened, _ in batch])
            for (_, patches), result in zip(batch, results, strict=True):
                if patches.done():
                    continue
                if isinstance(result, Exception):
                    patches.set_exception(result)
                else:
                    patches.set_result(result)

    async def _run_batch(self, batch: list[OpenedMedia]) -> list[Result]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, batch)
        except Exception as error:
            return [error] * len(batch)
