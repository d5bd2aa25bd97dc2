"""A process that decodes media: `python -m vitrine_vlm.encoder_service.decoding.decoder_main CONNECTION ARENA PIXELS`.

The arguments are inherited file descriptors, of a Unix socket and of an `Arena`, and the largest accepted number of
pixels. Files of strangers are read here and nowhere else, so that one that takes long, takes memory or crashes a
library takes no more than this process: it ends by a signal once a request has taken its CPU time, also in the middle
of native code, can ask for little memory, and may be lowered in its priority for as long as an item takes (`priority`).
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeAlias

from vitrine_vlm.encoder_service.decoding import image_decode  # before the first request, as it takes 0.1 s
from vitrine_vlm.encoder_service.decoding.arena import NUM_SLOTS, Arena
from vitrine_vlm.encoder_service.decoding.media_decoder import ImageHeader, VideoHeader
from vitrine_vlm.encoder_service.decoding.messages import (
    ConnectionEnded,
    Fields,
    receive_exactly,
    receive_message,
    send_message,
)
from vitrine_vlm.encoder_service.decoding.priority import is_lowered, lower_this_thread
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.errors import MediaError, MediaTooLarge
from vitrine_vlm.service_runtime.memory import reuse_picture_memory

READY = b"\1"
NEXT_FRAME = b"\1"
_MAX_FILE_NBYTES = 1 << 40
# Interpreter, libraries and the stacks of their threads; the file, twice.
_BASE_NBYTES = 384 * 1024 * 1024
# A picture in 4 bytes a pixel and the three 16-bit coefficients of a progressive JPEG's, or an AVIF's planes.
_NBYTES_A_PIXEL = 12

Handler: TypeAlias = "Callable[[_Decoder, Fields, bytes], Fields]"


class _Decoder:
    """Answers one request after the other.

    Args:
        max_memory_nbytes: for the message of a file that takes more.
    """

    def __init__(self, connection: socket.socket, arena: Arena, max_memory_nbytes: int) -> None:
        self._connection = connection
        self._arena = arena
        self._max_memory_nbytes = max_memory_nbytes

    def serve(self) -> None:
        """Answers until the connection ends."""
        self._connection.sendall(READY)
        with suppress(ConnectionEnded, OSError):
            request, file = receive_message(self._connection, _MAX_FILE_NBYTES)
            while True:
                with ThreadPoolExecutor(1) as thread:
                    request, file = thread.submit(self._answer_until_lowered, request, file).result()

    def _answer_until_lowered(self, request: Fields, file: bytes) -> tuple[Fields, bytes]:
        """Answers this request and those behind it; for an item that is not light it lowers this thread first.

        Returns:
            The first request of a light item that comes once this thread has been lowered: it is for another thread.
        """
        while True:
            if not request["is_light"]:
                lower_this_thread()
            self._answer(request, file)
            request, file = receive_message(self._connection, _MAX_FILE_NBYTES)
            if request["begins_item"] and request["is_light"] and is_lowered():
                return request, file

    def _answer(self, request: Fields, file: bytes) -> None:
        """Sends the answer of a request, which says how much of the CPU time is left."""
        begin_s = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # SIGPROF ends the process
        try:
            reply = _HANDLERS[request["do"]](self, request, file)
        except MediaError as error:
            reply = {"error": error.code, "message": str(error)}
        except MemoryError:
            reply = {
                "error": MediaTooLarge.code,
                "message": f"decoding takes more than {self._max_memory_nbytes >> 20} MiB of memory: scale it down",
            }
        signal.setitimer(signal.ITIMER_PROF, 0)
        # By the clock: Linux adds a tick of 1 to 10 ms to each timer, so that short requests would take nothing.
        cpu_left_s = max(0.0, request["cpu_s"] - (time.process_time() - begin_s))
        send_message(self._connection, reply | {"cpu_left_s": cpu_left_s})

    def open_image(self, request: Fields, file: bytes) -> Fields:
        return vars(image_decode.open_image(file, request["max_pixels"]))

    def decode_image(self, request: Fields, file: bytes) -> Fields:
        image_decode.decode_image(file, ImageHeader(**request["header"]), self._arena.pixels)
        return {}

    def open_video(self, request: Fields, file: bytes) -> Fields:
        from vitrine_vlm.encoder_service.decoding import video_decode

        return vars(video_decode.open_video(file, _limits(request)))

    def decode_video(self, request: Fields, file: bytes) -> Fields:
        """Sends a message a frame. A slot is written again once the reader has asked for the frame behind it."""
        from vitrine_vlm.encoder_service.decoding import video_decode

        limits, header, indices = _limits(request), VideoHeader(**request["header"]), request["indices"]
        num_in_slots = 0
        try:
            for number, pixels_HWC in enumerate(video_decode.decode_video(file, header, indices, limits)):
                height, width, _ = pixels_HWC.shape
                if height * width > limits.max_pixels:  # frames of a video may have several sizes
                    raise MediaTooLarge(
                        f"a video frame of {width}x{height} pixels: at most {limits.max_pixels} are accepted"
                    )
                if num_in_slots == NUM_SLOTS:
                    receive_exactly(self._connection, len(NEXT_FRAME))
                    num_in_slots -= 1
                self._arena.pixels(height, width, number % NUM_SLOTS)[:] = pixels_HWC
                send_message(self._connection, {"frame": [height, width]})
                num_in_slots += 1
        finally:
            receive_exactly(self._connection, num_in_slots * len(NEXT_FRAME))
        return {}


_HANDLERS: dict[str, Handler] = {
    each.__name__: each
    for each in (_Decoder.open_image, _Decoder.decode_image, _Decoder.open_video, _Decoder.decode_video)
}


def _limits(request: Fields) -> MediaLimits:
    return MediaLimits(max_pixels=request["max_pixels"], max_frames=request["max_frames"])


def max_memory_nbytes(max_pixels: int) -> int:
    """Memory that a decoder can ask for: what libraries and the largest picture take; see docs/media.md."""
    return _BASE_NBYTES + _NBYTES_A_PIXEL * max_pixels


def main() -> None:
    """Answers until the connection ends."""
    connection_fd, arena_fd, max_pixels = map(int, sys.argv[1:])
    # Ctrl-C goes to the whole group of processes; the encoder ends its decoders when it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reuse_picture_memory()
    nbytes = max_memory_nbytes(max_pixels)
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # neither core dumps nor other files
        resource.setrlimit(nothing, (0, 0))
    decoder = _Decoder(socket.socket(fileno=connection_fd), Arena(arena_fd, max_pixels), nbytes)
    os.close(arena_fd)
    # What libraries write about damaged files is in the answers; up to here errors are the installation's.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stderr.fileno())
    decoder.serve()


if __name__ == "__main__":
    main()
