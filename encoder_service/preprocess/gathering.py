"""Pictures that a GPU decodes, made into patches several at a time.

A thread takes whatever waits, one call decodes all of it, and one wait for the GPU ends it: threads that each do one
picture contend for the interpreter and for the decoder, and wait for the GPU as often as there are pictures. There are
two, so that one begins while the other waits for the GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia
from vitrine_vlm.service_runtime.supervisor import Supervisor

# More gain nothing, and every one waits for all of them.
_MAX_TOGETHER = 16
_NUM_THREADS = 2

Result = torch.Tensor | Exception


class Gathering:
    """Belongs to one event loop.

    Args:
        make: patches of each item, or why there are none; on one of two threads.
    """

    def __init__(self, make: Callable[[Sequence[OpenedMedia]], list[Result]]) -> None:
        self._make = make
        self._waiting: asyncio.Queue[tuple[OpenedMedia, asyncio.Future[torch.Tensor]]] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="encoder-gather")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, supervisor: Supervisor) -> None:
        """Begins to make patches, in one loop a thread; the supervisor owns them."""
        self._supervisor = supervisor
        self._tasks = [supervisor.start_task(f"gathering {index}", self._work()) for index in range(_NUM_THREADS)]

    async def close(self) -> None:
        """Drops what has not begun and waits for the rest."""
        if self._tasks:
            await self._supervisor.stop(*self._tasks)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def patches(self, opened: OpenedMedia) -> torch.Tensor:
        """See `OpenedMedia.patches`; cancelling drops what has not begun."""
        made: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((opened, made))
        return await made

    async def _work(self) -> None:
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < _MAX_TOGETHER and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            group = [(opened, made) for opened, made in taken if not made.done()]
            if not group:  # all were given up
                continue
            results = await self._make_all([opened for opened, _ in group])
            for (_, made), result in zip(group, results, strict=True):
                if made.done():
                    continue
                if isinstance(result, Exception):
                    made.set_exception(result)
                else:
                    made.set_result(result)

    async def _make_all(self, group: list[OpenedMedia]) -> list[Result]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._make, group)
        except Exception as error:
            return [error] * len(group)
