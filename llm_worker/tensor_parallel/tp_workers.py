"""Rank 0's control of the processes of ranks 1 and up: it starts, watches and ends them."""

from __future__ import annotations

import asyncio
import functools
import shutil
import socket
import tempfile
from pathlib import Path

from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.runner import MakeRunner
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.loading import rank_device
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.sharding import config_of_rank
from vitrine_vlm.llm_worker.tensor_parallel.channel import Channel
from vitrine_vlm.llm_worker.tensor_parallel.group import TorchGroup
from vitrine_vlm.llm_worker.tensor_parallel.leader import LeadingForwardPass
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.service_runtime.child_process import Child
from vitrine_vlm.service_runtime.lifecycle import EXIT_MARGIN_S
from vitrine_vlm.service_runtime.supervisor import Supervisor


class TpWorkers:
    """The processes of ranks 1 and up. Belongs to the event loop; `stop` must be called in any case."""

    def __init__(self, config: LlmConfig, supervisor: Supervisor) -> None:
        """
        Args:
            supervisor: fails when a rank ends by itself, or a step fails on rank 0. Nothing is cleaned up then, as
                other threads may be in a collective, waiting for a rank that has ended.
        """
        self._config = config
        self._supervisor = supervisor
        self._watching: list[asyncio.Task[None]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="vitrine-tp-"))  # of mode 700
        self._children: list[Child] = []
        self._channels: list[Channel] = []
        self._group: TorchGroup | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Starts the processes.

        Raises:
            CheckpointError: no such checkpoint, one that cannot be cut into so many parts, or fewer GPUs than ranks.
        """
        await asyncio.to_thread(_check, self._config)
        environment = self._config.as_environment(skip_tokenizer_init=True)
        for rank in range(1, self._config.tp):
            own_end, child_end = socket.socketpair()
            self._channels.append(Channel(own_end))
            with child_end:
                fd = child_end.fileno()
                arguments = [
                    "vitrine_vlm.llm_worker.tensor_parallel.tp_worker",
                    str(rank),
                    str(self._store_file),
                    str(fd),
                ]
                child = await Child.start(f"rank {rank}", arguments, environment, pass_fds=[fd])
            self._children.append(child)
            self._watching.append(self._supervisor.watch_child(child, can_unwind=False))

    def join(self) -> TorchGroup:
        """Joins the group as rank 0; blocks until all ranks have joined."""
        self._group = TorchGroup.join(0, self._config.tp, rank_device(self._config, 0), self._store_file)
        return self._group

    def forward_pass(self, decoder: TextDecoder, config: EngineConfig, make_runner: MakeRunner) -> ForwardPass:
        """Makes rank 0's forward pass, after `join`; blocks until the other ranks have loaded their weights.

        Raises:
            ChannelClosed, CheckpointError: see `LeadingForwardPass`.
        """
        assert self._group is not None
        return LeadingForwardPass(
            decoder, config, make_runner, self._group, self._channels, on_failure=self._report_failure
        )

    async def stop(self) -> None:
        await self._supervisor.stop(*self._watching)
        for channel in self._channels:
            channel.close()
        await asyncio.gather(*(child.stop(EXIT_MARGIN_S) for child in self._children))
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _store_file(self) -> Path:
        return self._folder / "store"

    def _report_failure(self, error: Exception) -> None:
        """Reports that rank 0 cannot continue. Safe on any thread."""
        fail = functools.partial(self._supervisor.fail, "step on rank 0", error, can_unwind=False)
        self._loop.call_soon_threadsafe(fail)


def _check(config: LlmConfig) -> None:
    """Raises the errors that would otherwise end every rank by itself."""
    for rank in range(config.tp):
        rank_device(config, rank)
    checkpoint = open_checkpoint(config.model, config.revision, config.served_model_name, config.load_format)
    config_of_rank(text_config(checkpoint), config.tp)
