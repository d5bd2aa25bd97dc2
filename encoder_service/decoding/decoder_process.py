"""A decoder that is a process of its own, as the encoder sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, Self

from vitrine_vlm.encoder_service.decoding import decoder_main
from vitrine_vlm.encoder_service.decoding.arena import NUM_SLOTS, Arena
from vitrine_vlm.encoder_service.decoding.media_decoder import ImageHeader, Pixels, VideoHeader
from vitrine_vlm.encoder_service.decoding.messages import (
    ConnectionEnded,
    Fields,
    receive_message,
    send_exactly,
    send_message,
)
from vitrine_vlm.encoder_service.decoding.plain_header import plain_header
from vitrine_vlm.encoder_service.decoding.priority import PriorityOfItem
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.errors import MediaError, MediaTooLarge, error_from_code
from vitrine_vlm.service_runtime.child_process import ChildFailed, bound_command
from vitrine_vlm.service_runtime.progress import ProcessStalled, Progress, wait_for

# Of the environment: what an interpreter needs to start, and none of a service's settings.
_ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONDONTWRITEBYTECODE",
    "HOME",
    "LANG",
    "TMPDIR",
)
# Of a decoder, as what waits for it sees them.
_ENDS = (OSError, ConnectionEnded, ProcessStalled)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class DecoderProcess:
    """A `MediaDecoder` for one item at a time.

    is_used: whether an item has it, as its pool says.

    Every method that decodes raises MediaTooLarge where the item's time or memory is used up, and MediaError where the
    process ended over it; then it is of no further use.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, connection: socket.socket, arena: Arena, max_pixels: int
    ) -> None:
        self._process = process
        self._connection = connection
        self._arena = arena
        self._max_pixels = max_pixels
        self._priority = PriorityOfItem(process.pid)
        self._progress = Progress(process.pid)
        self._loop = asyncio.get_running_loop()
        self._killed = False
        self.is_used = False
        self.begin_item(0.0, "", is_light=True)

    @classmethod
    async def start(cls, max_pixels: int) -> Self:
        """Starts a process, which takes a quarter of a second, and waits until it is ready.

        Args:
            max_pixels: of a picture or video frame at most.

        Raises:
            ChildFailed: it ended at its start; stderr has the reason.
            OSError: no process can be started.
        """
        ours, theirs = socket.socketpair()
        arena_fd = Arena.create(max_pixels)
        try:
            arena = Arena(arena_fd, max_pixels)
            fds = (theirs.fileno(), arena_fd)
            process = await asyncio.create_subprocess_exec(
                *bound_command([decoder_main.__name__, *map(str, (*fds, max_pixels))]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=fds,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _ONE_THREAD,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(arena_fd)
        decoder = cls(process, ours, arena, max_pixels)
        try:
            ours.setblocking(False)
            if await asyncio.get_running_loop().sock_recv(ours, 1) != decoder_main.READY:
                raise ChildFailed(f"a decoder {await decoder.ended()} at its start")
        except BaseException:
            decoder.kill()
            raise
        return decoder

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, or was killed here."""
        return self._killed or self._process.returncode is not None

    async def ended(self) -> str:
        """Waits for the end of the process; returns how it ended."""
        return _how(await self._process.wait())

    def kill(self) -> None:
        """Ends the process at once. On the event loop only."""
        self._killed = True
        with suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """Closes the connection of a process that has ended and is not used."""
        self._connection.close()

    def begin_item(self, cpu_s: float, setting: str, *, is_light: bool) -> None:
        """
        Args:
            cpu_s: time for all requests of the next item, in seconds.
            setting: its flag, for errors.
            is_light: whether the item is expected to take so little that it has the usual priority.
        """
        self._limit_s = self._cpu_left_s = cpu_s
        self._setting = setting
        self._begins_item = True
        self._is_light = is_light
        self._priority.begin(is_light)
        self._progress.begin_work(cpu_s)

    def end_item(self) -> None:
        """Returns what large pictures took of the shared memory."""
        self._arena.release()

    def open_image(self, data: bytes, limits: MediaLimits) -> ImageHeader:
        """See `MediaDecoder`. The plainest files are not sent for it."""
        header = plain_header(data, limits.max_pixels)
        return header or ImageHeader(**self._ask("open_image", data, max_pixels=limits.max_pixels))

    @contextmanager
    def image_pixels(self, data: bytes, header: ImageHeader) -> Iterator[Pixels]:
        """See `MediaDecoder`."""
        self._ask("decode_image", data, header=vars(header))
        yield self._arena.pixels(header.height, header.width)

    def open_video(self, data: bytes, limits: MediaLimits) -> VideoHeader:
        """See `MediaDecoder`."""
        return VideoHeader(**self._ask("open_video", data, max_pixels=limits.max_pixels, max_frames=limits.max_frames))

    def video_frames(
        self, data: bytes, header: VideoHeader, indices: Sequence[int], limits: MediaLimits
    ) -> Iterator[Pixels]:
        """See `MediaDecoder`. The next frame is decoded while the caller has this one."""
        self._send(
            "decode_video",
            data,
            header=vars(header),
            indices=list(indices),
            max_pixels=limits.max_pixels,
            max_frames=limits.max_frames,
        )
        number, wants_next = 0, True
        try:
            while "frame" in (reply := self._receive()):
                height, width = reply["frame"]
                wants_next = False
                yield self._arena.pixels(height, width, number % NUM_SLOTS)
                wants_next = True
                number += 1
                self._send_next()
        finally:
            if not wants_next:  # frames will come that nothing reads
                self._loop.call_soon_threadsafe(self.kill)

    def _ask(self, request: str, file: bytes, **fields: object) -> Fields:
        self._send(request, file, **fields)
        return self._receive()

    def _send(self, request: str, file: bytes, **fields: object) -> None:
        # A timer of 0 would be none.
        head = {
            "do": request,
            "begins_item": self._begins_item,
            "is_light": self._is_light,
            "cpu_s": max(self._cpu_left_s, 1e-3),
            **fields,
        }
        self._begins_item = False
        try:
            send_message(self._connection, head, file, self._wait)
        except _ENDS as error:
            self._raise_end(error)

    def _send_next(self) -> None:
        try:
            send_exactly(self._connection, [decoder_main.NEXT_FRAME], self._wait)
        except _ENDS as error:
            self._raise_end(error)

    def _receive(self) -> Fields:
        try:
            reply, _ = receive_message(self._connection, wait=self._wait)
        except _ENDS as error:
            self._raise_end(error)
        if "cpu_left_s" in reply:
            self._cpu_left_s = min(reply.pop("cpu_left_s"), self._cpu_left_s)
        if "error" in reply:
            raise error_from_code(reply["error"], reply["message"])
        return reply

    def _wait(self, event: int) -> None:
        """
        Raises:
            ProcessStalled, TimeoutError: see `Progress.look`.
        """
        wait_for(self._connection.fileno(), event, self._progress, (self._priority,))

    def _raise_end(self, error: Exception) -> NoReturn:
        """Raises what the item gets whose decoder ended, or is ended here."""
        if isinstance(error, ProcessStalled | TimeoutError):
            self._loop.call_soon_threadsafe(self.kill)
        code = asyncio.run_coroutine_threadsafe(self._process.wait(), self._loop).result()
        if code == -signal.SIGPROF or isinstance(error, TimeoutError):
            raise MediaTooLarge(
                f"decoding takes more than {self._limit_s:g} s: send a smaller file, or one that is encoded more "
                f"simply ({self._setting} is the limit)"
            ) from error
        how = str(error) if isinstance(error, ProcessStalled) else _how(code)
        raise MediaError(f"the process that decoded the file {how}: the file may be damaged") from error


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
