"""A worker of vLLM, as far as the connector is concerned: a process with a WorkerSide and an encoder cache.

Arguments: the socket's path, the rank. Standard input: a line of JSON for each step (loads, discards), and the file to
which its rows are then written. Standard output: a line when the step is done.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vitrine_vlm.vllm_connector.messages import StepCommands
from vitrine_vlm.vllm_connector.worker_side import WorkerSide


class WorkerProcess:
    """The test's side of it."""

    def __init__(self, path: Path, rank: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self, loads: Mapping[str, int], discards: Sequence[int], file: Path) -> dict[str, torch.Tensor]:
        """Runs a step and returns the encoder cache behind it. An error there ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([loads, discards, str(file)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == "done\n", "the worker has ended"
        with np.load(file) as saved:
            return {name: torch.from_numpy(saved[name]) for name in saved}

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)


@contextmanager
def worker_processes(path: Path, num_workers: int) -> Iterator[list[WorkerProcess]]:
    workers = [WorkerProcess(path, rank) for rank in range(num_workers)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def main() -> None:
    torch.set_num_threads(1)
    side = WorkerSide(Path(sys.argv[1]), int(sys.argv[2]), torch.device("cpu"))
    encoder_cache: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        loads, discards, file = json.loads(line)
        side.start_step(StepCommands(loads, discards), encoder_cache)
        np.savez(file, **{name: rows.numpy() for name, rows in encoder_cache.items()})  # type: ignore[arg-type]
        print("done", flush=True)


if __name__ == "__main__":
    main()
