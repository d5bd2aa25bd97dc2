"""The decoders of an encoder, and the order in which items use them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from vitrine_vlm.encoder_service.decoding.decoder_process import DecoderProcess
from vitrine_vlm.encoder_service.decoding.work import DecodeWork
from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.service_runtime.child_process import ChildFailed
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
# What any use of a decoder takes at least.
_LEAST_S = 2e-3


@dataclass(eq=False)
class _WaitingItem:
    work: DecodeWork
    taken: asyncio.Future[DecoderProcess]
    since: float = field(default_factory=time.monotonic)

    def response_ratio(self, now: float) -> float:
        """How many times its own work the item has waited."""
        return (now - self.since) / max(_LEAST_S, self.work.seconds)


class DecoderPool:
    """Processes that decode, each for one item at a time. It belongs to one event loop.

    All but one of them may be used by items that take long; those share a budget of memory. So a picture that takes
    little never waits for a whole item that takes much. The next one is the one that has waited longest for what it
    takes (highest response ratio next): of many that take more, one that takes little passes by most.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        max_pixels: int,
        image_timeout_s: float,
        video_timeout_s: float,
        max_decoded_nbytes: int,
    ) -> None:
        """
        Args:
            num_processes: at least 2.
            max_pixels: of a picture or video frame.
            image_timeout_s, video_timeout_s: CPU time of an item.
            max_decoded_nbytes: memory of items that take long; one that exceeds it alone runs alone.
        """
        self.num_processes = num_processes
        self._max_pixels = max_pixels
        self._timeouts = {
            "image": (image_timeout_s, "--decode-timeout-s"),
            "video": (video_timeout_s, "--video-decode-timeout-s"),
        }
        self._heavy = _HeavyItems(num_processes - 1, max_decoded_nbytes)
        self._processes: list[DecoderProcess] = []
        self._idle: list[DecoderProcess] = []
        self._waiting: list[_WaitingItem] = []
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._processes]

    def start(self, supervisor: Supervisor) -> None:
        """Starts the processes and keeps as many of them; the supervisor owns what does so."""
        self._supervisor = supervisor
        self._keepers = [
            supervisor.start_task(f"decoder {index}", self._keep_process(index)) for index in range(self.num_processes)
        ]

    async def close(self) -> None:
        """Ends all processes, also those in use, whose items fail."""
        if self._keepers:
            await self._supervisor.stop(*self._keepers)
        for process in self._processes:
            process.kill()
        await asyncio.gather(*(process.ended() for process in self._processes))
        for process in self._processes:
            if not process.is_used:
                process.close()

    @asynccontextmanager
    async def decoder(self, work: DecodeWork) -> AsyncIterator[DecoderProcess]:
        """A decoder for one item, as soon as one may be used for such work; items that can go on do so in turn.

        One whose work goes on behind the end of the context has to be killed there.
        """
        process = await self._take(work)
        process.begin_item(*self._timeouts[work.kind], is_light=work.is_light)
        try:
            yield process
        finally:
            process.end_item()
            self._put(process, work)

    async def _take(self, work: DecodeWork) -> DecoderProcess:
        item = _WaitingItem(work, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        self._dispatch()
        try:
            return await item.taken
        except asyncio.CancelledError:
            if item.taken.cancelled():
                self._waiting.remove(item)
            else:
                self._put(item.taken.result(), work)
            raise

    def _put(self, process: DecoderProcess, work: DecodeWork) -> None:
        self._heavy.remove(work)
        process.is_used = False
        if process.has_ended:
            process.close()
        else:
            self._idle.append(process)
        self._dispatch()

    def _dispatch(self) -> None:
        """Gives idle processes to the items that have waited longest for their work, of those that may use one now."""
        # One that was killed from outside is there until its keeper has noticed.
        self._idle = [process for process in self._idle if not process.has_ended]
        now = time.monotonic()
        waiting = sorted(self._waiting, key=lambda item: item.response_ratio(now), reverse=True) if self._idle else ()
        for item in waiting:
            if not item.taken.done() and self._heavy.add(item.work):
                self._waiting.remove(item)
                process = self._idle.pop()
                process.is_used = True
                item.taken.set_result(process)
                if not self._idle:
                    return

    async def _keep_process(self, index: int) -> None:
        """Runs a process, and another one whenever it has ended.

        Raises:
            ChildFailed, OSError: the first one cannot be started.
        """
        backoff, has_started = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S), False
        while True:
            try:
                process = await DecoderProcess.start(self._max_pixels)
            except (ChildFailed, OSError) as error:
                if not has_started:
                    raise
                _log.error("decoder %d cannot be started again: %s", index, error)
                await backoff.pause()
                continue
            has_started = True
            backoff.reset()
            self._processes.append(process)
            self._idle.append(process)
            self._dispatch()
            how = await process.ended()
            self._processes.remove(process)
            if not process.is_used:
                process.close()
            _log.info("decoder %d %s and is started again", index, how)


class _HeavyItems:
    """Items in work that are not light."""

    def __init__(self, max_items: int, max_nbytes: int) -> None:
        self._max_items, self._max_nbytes = max_items, max_nbytes
        self._num_items = self._nbytes = 0

    def add(self, work: DecodeWork) -> bool:
        """Adds an item, unless it has to wait for others; a light one never has to."""
        if work.is_light:
            return True
        if self._num_items and (self._num_items == self._max_items or self._nbytes + work.nbytes > self._max_nbytes):
            return False
        self._num_items += 1
        self._nbytes += work.nbytes
        return True

    def remove(self, work: DecodeWork) -> None:
        if not work.is_light:
            self._num_items -= 1
            self._nbytes -= work.nbytes
