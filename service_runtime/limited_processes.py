"""Processes of a module that answers lines and limits itself, each ended by a signal where a line takes too much.

A thread that is in the middle of native code, or of one long operation, cannot be stopped; a process can.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass


class TookTooMuch(Exception):
    """A process ended while it worked on a line. is_time: whether by its CPU time, otherwise by its memory."""

    def __init__(self, *, is_time: bool) -> None:
        super().__init__("more CPU time than it may" if is_time else "too much memory")
        self.is_time = is_time


@dataclass(frozen=True)
class _Process:
    """connection: to its stdin, a Unix socket."""

    process: subprocess.Popen[str]
    connection: socket.socket

    def end(self) -> int:
        """Waits for its end, which comes with the end of its stdin; returns how it ended."""
        self.connection.close()
        self.process.communicate()
        return self.process.returncode


class LimitedProcesses:
    """As many processes as threads call `ask` at once; they are started when first needed. Safe on any thread.

    Args:
        module: of which `python -m module` writes a line to stdout for each from stdin, and ends with stdin. It limits
            its memory, and its CPU time by SIGPROF.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._working: set[subprocess.Popen[str]] = set()

    def ask(self, line: str, fds: Sequence[int] = ()) -> str:
        """Returns the line that answers this one.

        Args:
            fds: file descriptors that the process gets with the line, for as long as it works on it.

        Raises:
            TookTooMuch: the process ended instead.
        """
        process = self._take_idle() or self._start()
        with self._lock:
            self._working.add(process.process)
        try:
            answer = _ask(process, line, fds)
            if not answer:
                raise TookTooMuch(is_time=process.end() == -signal.SIGPROF)
        finally:
            with self._lock:
                self._working.discard(process.process)
        with self._lock:
            self._idle.append(process)
        return answer

    def close(self) -> None:
        """Ends the processes that work on nothing; others end with their line."""
        with self._lock:
            processes, self._idle = self._idle, []
        for process in processes:
            process.end()

    def kill(self) -> None:
        """Ends all processes at once: what asks those that work gets `TookTooMuch`."""
        with self._lock:
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
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                # What libraries write in the middle of a refused line is about their insides.
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                # Ctrl-C goes to the whole group of this process, which still answers what is in flight.
                process_group=0,
            )
        return _Process(process, ours)


def _ask(process: _Process, line: str, fds: Sequence[int]) -> str:
    """Returns the process's answer; an empty string where it has ended."""
    assert process.process.stdout is not None
    data = f"{line}\n".encode()
    try:
        sent = socket.send_fds(process.connection, [data], fds) if fds else 0
        process.connection.sendall(data[sent:])
        return process.process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return ""
