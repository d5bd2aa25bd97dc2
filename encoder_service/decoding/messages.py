"""Messages between an encoder and its decoders: fields as JSON, and a file's bytes behind them; no pickle."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Fields: TypeAlias = dict[str, Any]
# Waits until a connection that does not block can be read (POLLIN) or written (POLLOUT).
Wait: TypeAlias = Callable[[int], None]

_HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes of the file
# A video's indices are the longest.
_MAX_FIELDS_NBYTES = 16 * 1024 * 1024


class ConnectionEnded(Exception):
    """The other side has closed the connection, or its process has ended."""


def _never(event: int) -> None:
    raise AssertionError("a blocking connection is not waited for")


def send_message(connection: socket.socket, fields: Fields, file: bytes = b"", wait: Wait = _never) -> None:
    """
    Raises:
        OSError: the other side has ended.
    """
    encoded = json.dumps(fields).encode()
    head = _HEAD.pack(len(encoded), len(file)) + encoded
    # At once, so that the other side wakes up once.
    send_exactly(connection, (head, file), wait)


def send_exactly(connection: socket.socket, buffers: Iterable[bytes], wait: Wait = _never) -> None:
    """
    Raises:
        OSError: the other side has ended.
    """
    left = [memoryview(buffer) for buffer in buffers if buffer]
    while left:
        try:
            num_sent = connection.sendmsg(left)
        except BlockingIOError:
            wait(select.POLLOUT)
            continue
        while left and num_sent >= len(left[0]):
            num_sent -= len(left.pop(0))
        if left:
            left[0] = left[0][num_sent:]


def receive_message(connection: socket.socket, max_file_nbytes: int = 0, wait: Wait = _never) -> tuple[Fields, bytes]:
    """The next message: its fields and its file.

    Raises:
        ConnectionEnded: there is none, or it has a length that no message has.
        OSError: the other side has ended.
    """
    fields_nbytes, file_nbytes = _HEAD.unpack(receive_exactly(connection, _HEAD.size, wait))
    if fields_nbytes > _MAX_FIELDS_NBYTES or file_nbytes > max_file_nbytes:
        raise ConnectionEnded(f"a message of {fields_nbytes} + {file_nbytes} bytes")
    fields = json.loads(receive_exactly(connection, fields_nbytes, wait))
    return fields, receive_exactly(connection, file_nbytes, wait)


def receive_exactly(connection: socket.socket, nbytes: int, wait: Wait = _never) -> bytes:
    """
    Raises:
        ConnectionEnded: fewer bytes come; OSError: the other side has ended.
    """
    parts: list[bytes] = []
    missing = nbytes
    while missing:
        try:
            parts.append(connection.recv(missing, socket.MSG_WAITALL))
        except BlockingIOError:
            wait(select.POLLIN)
            continue
        if not parts[-1]:
            raise ConnectionEnded(f"{missing} of {nbytes} bytes did not come")
        missing -= len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)
