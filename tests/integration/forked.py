"""Services in copies of a process that has imported them: imports are most of what the start of a service computes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import NoReturn

import torch

# Where there is a GPU, services are executed: torch refuses CUDA in a copy of a process that has counted its GPUs, as
# importing `tests` does ("Cannot re-initialize CUDA in forked subprocess").
CAN_FORK = not torch.cuda.is_available()
CONTEXT: ForkServerContext | SpawnContext = (
    multiprocessing.get_context("forkserver") if CAN_FORK else multiprocessing.get_context("spawn")
)
# Imports the services once, at the first start.
CONTEXT.set_forkserver_preload(
    [
        "vitrine_vlm.encoder_service.__main__",
        "vitrine_vlm.llm_worker.__main__",
        "vitrine_vlm.gateway.__main__",
        "tests.integration.breakable",
    ]
)
# An exit status can be read once, and the start of a process reads those of all others.
_lock = threading.Lock()


class ForkedProcess:
    """`python -m module flags...` as a copy, with as much of `subprocess.Popen` as tests use."""

    def __init__(self, module: str, flags: Sequence[str]) -> None:
        self._module = module
        reader, writer = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(
            target=_run, args=(module, flags, writer, {**os.environ, "OMP_NUM_THREADS": "1"}), daemon=True
        )
        with _lock:
            self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if not connection.wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self._module, timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_module(module: str, flags: Sequence[str], fd: int) -> NoReturn:
    """Ends this process as the module's command, whose output goes to the file descriptor."""
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [module, *flags]
    sys.exit(importlib.import_module(f"{module}.__main__").main())


def _run(
    module: str, flags: Sequence[str], output: connection.Connection[str, str], environment: dict[str, str]
) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    run_module(module, flags, output.fileno())
