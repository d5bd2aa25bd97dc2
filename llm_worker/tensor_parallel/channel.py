"""Messages of rank 0 to another rank, and its answers: frames over a Unix socket that only the two of them have.

A frame is its kind (1 byte), its length (8 bytes, little-endian) and so many bytes. A rank that ends closes its side.
"""

from __future__ import annotations

import socket
import struct
import threading
from enum import IntEnum

_HEADER = struct.Struct("<BQ")
# A step of a million tokens of context has 40 MB.
_MAX_NBYTES = 1 << 28


class Kind(IntEnum):
    """LOADED: the other rank has loaded its weights, with the number of blocks of keys and values (8 bytes) that it has
    memory for. STEP: of a StepSerializer. MAP: a pool's number (8 bytes) and its PoolSource as JSON, answered by MAPPED
    with what went wrong, empty if nothing did. UNMAP: a pool's number.
    """

    LOADED = 1
    STEP = 2
    MAP = 3
    MAPPED = 4
    UNMAP = 5


class ChannelClosed(ConnectionError):
    """The other side has ended."""


class Channel:
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        # Reentrant: a finalizer may send while this thread is about to, before or after its frame, never within.
        self._sending = threading.RLock()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """
        Raises:
            ChannelClosed: the other rank is gone.
        """
        frame = _HEADER.pack(kind, len(payload)) + payload
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError as error:
                raise ChannelClosed(f"the other rank is gone: {error.strerror}") from error

    def receive(self) -> tuple[Kind, bytes]:
        """Waits for the next frame.

        Raises:
            ChannelClosed: there will be none.
            ValueError: what comes is no frame.
        """
        number, nbytes = _HEADER.unpack(self._read(_HEADER.size))
        if nbytes > _MAX_NBYTES:
            raise ValueError(f"a frame of {nbytes} bytes, at most {_MAX_NBYTES} are taken")
        return Kind(number), self._read(nbytes)

    def expect(self, kind: Kind) -> bytes:
        """The payload of the next frame, which is of this kind; raises as `receive`."""
        received, payload = self.receive()
        if received != kind:
            raise ValueError(f"a frame of kind {received.name}, expected {kind.name}")
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
                raise ChannelClosed(f"the other rank is gone: {error.strerror}") from error
            if not count:
                raise ChannelClosed("the other rank has closed the channel")
            view = view[count:]
        return bytes(buffer)
