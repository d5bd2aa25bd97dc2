"""The connector in a vLLM worker: rows land on the thread of the worker channel, steps load them from there."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import torch

from vitrine_vlm.vllm_connector.messages import StepCommands
from vitrine_vlm.vllm_connector.row_landing import RowLanding
from vitrine_vlm.vllm_connector.worker_channel import WorkerChannel


class WorkerSide:
    """
    Args:
        path: the socket of the worker channel.
        rank: this worker's rank in its tensor-parallel group.
        device: the worker's device.
    """

    def __init__(self, path: Path, rank: int, device: torch.device) -> None:
        self._landing = RowLanding(device)
        self._channel = WorkerChannel(path, rank, device, self._landing)
        self._channel.start()

    def start_step(self, commands: StepCommands, encoder_cache: MutableMapping[str, torch.Tensor]) -> None:
        """
        Raises:
            RuntimeError: rows that were promised are not here.
        """
        self._landing.load(commands.loads, encoder_cache)
        self._landing.discard(commands.discards)

    def close(self) -> None:
        self._channel.close()
        self._landing.close()
