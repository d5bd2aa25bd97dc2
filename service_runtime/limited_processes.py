"""Processes of a module that answers lines and limits itself, each ended by a signal where a line takes too much.

A thread that is in the middle of native code, or of one long operation, cannot be stopped; a process can.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from vitrine_vlm.errors import InternalError
from vitrine_vlm.service_runtime.progress import ProcessStalled, Progress, wait_for

# CPU time of a process's start: one imports transformers.
_START_S = 5.0
_READ_NBYTES = 1024 * 1024


class TookTooMuch(Exception):
    """A process ended while it worked on a line. is_time: whether by its CPU time, otherwise by its memory."""

    def __init__(self, *, is_time: bool) -> None:
        super().__init__("more CPU time than it may" if is_time else "too much memory")
        self.is_time = is_time


@dataclass(frozen=True)
class _Process:
    """connection: to its stdin, a Unix socket that does not block."""

    process: subprocess.Popen[bytes]
    connection: socket.socket

    def end(self) -> int:
        """Ends it, if it has not ended; returns how it did."""
        self.connection.close()
        self.process.kill()
        self.process.communicate()
        return self.process.returncode


class LimitedProcesses:
    """As many processes as threads call `ask` at once; they are started when first needed. Safe on any thread.

    Args:
        module: of which `python -m module` writes a line to stdout for each from stdin, and ends with stdin. It limits
            its memory, and its CPU time by SIGPROF.
        cpu_s: the CPU time that it may take for a line.
    """

    def __init__(self, module: str, cpu_s: float) -> None:
        self._module = module
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._is_closed = False
        self._idle: list[_Process] = []
        self._working: set[subprocess.Popen[bytes]] = set()

    def ask(self, line: str, fds: Sequence[int] = ()) -> str:
        """Returns the line that answers this one.

        Args:
            fds: file descriptors that the process gets with the line, for as long as it works on it.

        Raises:
            TookTooMuch: the process ended instead, or is late, see `Progress`, and was ended.
            InternalError: the process did nothing for too long and was ended, or was killed from outside.
        """
        process = self._take_idle() or self._start()
        with self._lock:
            self._working.add(process.process)
            is_closed = self._is_closed
        try:
            if is_closed:  # meanwhile
                process.end()
                raise TookTooMuch(is_time=False)
            answer = self._ask(process, line, fds)
        finally:
            with self._lock:
                self._working.discard(process.process)
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._idle.append(process)
        if is_closed:
            process.end()
        return answer

    def close(self) -> None:
        """Ends the processes that work on nothing; others end with their line. No other is started."""
        with self._lock:
            self._is_closed = True
            processes, self._idle = self._idle, []
        for process in processes:
            process.end()

    def kill(self) -> None:
        """Ends all processes at once: what asks those that work gets an error."""
        with self._lock:
            self._is_closed = True
            for process in self._working:
                process.kill()
        self.close()

    def _take_idle(self) -> _Process | None:
        """A process that works on nothing; one that was ended from outside meanwhile is of no use for a line."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.process.poll() is None:
                    return process
                process.end()
        return None

    def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                # What libraries write in the middle of a refused line is about their insides.
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # Ctrl-C goes to the whole group of this process, which still answers what is in flight.
                process_group=0,
            )
        return _Process(process, ours)

    def _ask(self, process: _Process, line: str, fds: Sequence[int]) -> str:
        """See `ask`; the process is of use for other lines unless this raises."""
        progress = Progress(process.process.pid)
        progress.begin_work(_START_S + self._cpu_s)
        try:
            _send(process, f"{line}\n".encode(), fds, progress)
            return _receive_line(process, progress)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = process.end()
            if code == -signal.SIGKILL:  # which no limit of its own sends
                raise InternalError(f"the process {self._module} was killed: try again") from None
            raise TookTooMuch(is_time=code == -signal.SIGPROF) from None
        except TimeoutError as error:
            process.end()
            raise TookTooMuch(is_time=True) from error
        except ProcessStalled as error:
            process.end()
            raise InternalError(f"the process {self._module} {error} and was ended: try again") from error
        except BaseException:
            process.end()
            raise


def _send(process: _Process, data: bytes, fds: Sequence[int], progress: Progress) -> None:
    left, connection = memoryview(data), process.connection
    while left:
        try:
            left = left[socket.send_fds(connection, [left], fds) if fds else connection.send(left) :]
            fds = ()
        except BlockingIOError:
            wait_for(connection.fileno(), select.POLLOUT, progress)


def _receive_line(process: _Process, progress: Progress) -> str:
    """
    Raises:
        EOFError: the process has ended.
    """
    assert process.process.stdout is not None
    stdout, pieces = process.process.stdout.fileno(), [b""]
    while not pieces[-1].endswith(b"\n"):  # it writes one line, in ASCII, and then waits for another
        wait_for(stdout, select.POLLIN, progress)
        pieces.append(os.read(stdout, _READ_NBYTES))
        if not pieces[-1]:
            raise EOFError
    return b"".join(pieces).decode()
