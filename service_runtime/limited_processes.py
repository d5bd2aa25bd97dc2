"""Processes of a module that answers lines and limits itself, each ended by a signal where a line takes too much.

A thread that is in the middle of native code, or of one long operation, cannot be stopped; a process can.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading


class TookTooMuch(Exception):
    """A process ended while it worked on a line. is_time: whether by its CPU time, otherwise by its memory."""

    def __init__(self, *, is_time: bool) -> None:
        super().__init__("more CPU time than it may" if is_time else "too much memory")
        self.is_time = is_time


class LimitedProcesses:
    """As many processes as threads call `ask` at once; they are started when first needed. Safe on any thread.

    Args:
        module: of which `python -m module` writes a line to stdout for each from stdin, and ends with stdin. It limits
            its memory, and its CPU time by SIGPROF.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []

    def ask(self, line: str) -> str:
        """Returns the line that answers this one.

        Raises:
            TookTooMuch: the process ended instead.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = self._start()
        answer = _ask(process, line)
        if not answer:
            process.communicate()
            raise TookTooMuch(is_time=process.returncode == -signal.SIGPROF)
        with self._lock:
            self._idle.append(process)
        return answer

    def close(self) -> None:
        """Ends the processes that work on nothing; others end with their line."""
        with self._lock:
            processes, self._idle = self._idle, []
        for process in processes:
            process.communicate()  # closes its stdin, at whose end it ends

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries write in the middle of a refused line is about their insides
            text=True,
            encoding="utf-8",
        )


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """Returns the process's answer; an empty string where it has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""
