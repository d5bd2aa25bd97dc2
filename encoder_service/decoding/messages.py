"""Messages between an encoder and its decoders: fields as JSON, and a file's bytes behind them; no pickle."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, TypeAlias

Fields: TypeAlias = dict[str, Any]

_HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes of the file
# A video's indices are the longest.
_MAX_FIELDS_NBYTES = 16 * 1024 * 1024


class ConnectionEnded(Exception):
    """The other side has closed the connection, or its process has ended."""


def send_message(connection: socket.socket, fields: Fields, file: bytes = b"") -> None:
    """
    Raises:
        OSError: the other side has ended, or does not read within the connection's timeout.
    """
    encoded = json.dumps(fields).encode()
    head = _HEAD.pack(len(encoded), len(file)) + encoded
    # At once, so that the other side wakes up once.
    num_sent = connection.sendmsg((head, file)) if file else 0
    if num_sent < len(head):
        connection.sendall(head[num_sent:])
    if num_sent < len(head) + len(file):
        connection.sendall(memoryview(file)[max(0, num_sent - len(head)) :])


def receive_message(connection: socket.socket, max_file_nbytes: int = 0) -> tuple[Fields, bytes]:
    """The next message: its fields and its file.

    Raises:
        ConnectionEnded: there is none, or it has a length that no message has.
        OSError: it does not come within the connection's timeout.
    """
    fields_nbytes, file_nbytes = _HEAD.unpack(receive_exactly(connection, _HEAD.size))
    if fields_nbytes > _MAX_FIELDS_NBYTES or file_nbytes > max_file_nbytes:
        raise ConnectionEnded(f"a message of {fields_nbytes} + {file_nbytes} bytes")
    return json.loads(receive_exactly(connection, fields_nbytes)), receive_exactly(connection, file_nbytes)


def receive_exactly(connection: socket.socket, nbytes: int) -> bytes:
    """
    Raises:
        ConnectionEnded: fewer bytes come; OSError: they do not come within the connection's timeout.
    """
    if not nbytes:
        return b""
    received = connection.recv(nbytes, socket.MSG_WAITALL)
    if len(received) == nbytes:  # always on a connection without a timeout
        return received
    parts, missing = [received], nbytes - len(received)
    while missing and parts[-1]:
        parts.append(connection.recv(missing, socket.MSG_WAITALL))
        missing -= len(parts[-1])
    if missing:
        raise ConnectionEnded(f"{missing} of {nbytes} bytes did not come")
    return b"".join(parts)
