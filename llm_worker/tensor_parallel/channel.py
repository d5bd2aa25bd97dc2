"""Messages between rank 0 and another rank: frames over a Unix socket pair.

A frame is its kind (1 byte), the length of its payload (8 bytes, little-endian) and the payload. A rank that ends
closes its side.
"""

from __future__ import annotations

import socket
import struct
import threading
from enum import IntEnum

_HEADER = struct.Struct("<BQ")
# A step of a million tokens of context has 40 MB.
_MAX_NBYTES = 1 << 28


class FrameKind(IntEnum):
    """LOADED: the other rank has loaded its weights; payload: the number of KV blocks that it has memory for (8 bytes).
    STEP: payload of a StepSerializer. MAP: a pool's number (8 bytes) and its PoolSource as JSON, answered by MAPPED
    with the error, empty if there was none. UNMAP: a pool's number.
    """

    LOADED = 1
    STEP = 2
    MAP = 3
    MAPPED = 4
    UNMAP = 5


class ChannelClosed(ConnectionError):
    """The other side has ended."""


class Channel:
    """One side of the connection between two ranks."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        # Reentrant: a finalizer may send on this thread just before or after another frame is sent, never within it.
        self._sending = threading.RLock()

    def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """
        Raises:
            ChannelClosed: the other rank has ended.
        """
        frame = _HEADER.pack(kind, len(payload)) + payload
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError as error:
                raise ChannelClosed(f"the other rank has ended: {error.strerror}") from error

    def receive(self) -> tuple[FrameKind, bytes]:
        """Waits for the next frame.

        Raises:
            ChannelClosed: the other rank has ended.
            ValueError: the received bytes are no frame.
        """
        number, nbytes = _HEADER.unpack(self._read(_HEADER.size))
        if nbytes > _MAX_NBYTES:
            raise ValueError(f"a frame of {nbytes} bytes was received, at most {_MAX_NBYTES} are accepted")
        return FrameKind(number), self._read(nbytes)

    def expect(self, kind: FrameKind) -> bytes:
        """The payload of the next frame, which is of this kind; raises as `receive`."""
        received, payload = self.receive()
        if received != kind:
            raise ValueError(f"a frame of kind {received.name} was received, expected {kind.name}")
        return payload

    def close(self) -> None:
        self._socket.close()

    def _read(self, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        view = memoryview(buffer)
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise ChannelClosed(f"the other rank has ended: {error.strerror}") from error
            if not count:
                raise ChannelClosed("the other rank has closed the channel")
            view = view[count:]
        return bytes(buffer)
