"""A process that reads large bodies of requests: what its module does at its end, and how it limits itself.

To parse, count or decode tens of megabytes takes the interpreter from all threads of a service for as long. Here it
takes a core at most, and not before what serves other requests.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.memory_file import MemoryFile

MAX_CPU_S = 30.0
_NICENESS = 10
# The interpreter and its libraries; of a body its bytes and its text, which has four bytes a character where one of
# them is beyond Unicode's first 65536, and what is decoded.
_BASE_NBYTES = 256 * 1024 * 1024
_NBYTES_A_BYTE = 8
_MAX_LINE_NBYTES = 64 * 1024

# Keeps bytes for the service; returns where they begin and end in what it gets.
Keep: TypeAlias = Callable[[bytes], tuple[int, int]]
# The bytes that the process has kept from one place to another, for the service.
Kept: TypeAlias = Callable[[int, int], bytes]
# From a body and the service's arguments to what the service gets of it, in JSON's types.
Read: TypeAlias = Callable[[bytes, dict[str, Any], Keep], Any]


def answer_bodies(read: Read) -> None:
    """Answers the lines of a `BodyReader` until stdin ends; see `LimitedProcesses`."""
    os.nice(_NICENESS)
    connection = socket.socket(fileno=0)
    while True:
        line, fds, _, _ = socket.recv_fds(connection, _MAX_LINE_NBYTES, 2)
        if not line:
            return
        with MemoryFile(fds[0]) as body, MemoryFile(fds[1]) as kept:
            max_nbytes = _BASE_NBYTES + _NBYTES_A_BYTE * body.nbytes
            resource.setrlimit(resource.RLIMIT_DATA, (max_nbytes, resource.RLIM_INFINITY))
            signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # SIGPROF ends a process, also in native code
            answer = _answer(read, body, json.loads(line), kept)
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _answer(read: Read, body: MemoryFile, arguments: dict[str, Any], kept: MemoryFile) -> dict[str, Any]:
    try:
        found = read(body.read(), arguments, kept.append)
        return {"found": kept.append(json.dumps(found, ensure_ascii=False).encode())}
    except VitrineError as error:
        return {"error": error.code, "message": str(error), "param": error.param}
    except MemoryError:
        os._exit(1)  # a traceback would take memory and time
    except Exception:
        return {"fault": traceback.format_exc()}
