"""Data parallel: one encoder process a GPU, each with a port of its own, kept alive by this one.

The ranks know nothing of each other. A client that is given all their addresses spreads the items of a request over
them, takes every item's rows from the rank that made them, and goes on elsewhere while one is down.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from typing import Any

import torch

from embedding_transport.errors import EncoderUnavailable
from encoder_service.config import EncoderConfig
from service_runtime.backoff import Backoff
from service_runtime.child_process import Child

_log = logging.getLogger(__name__)
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
# On top of the time the ranks may take to drain.
_STOP_MARGIN_S = 10.0
# Values of CUDA_VISIBLE_DEVICES that hide all.
_NO_GPU = ("", "-1")


async def serve_ranks(config: EncoderConfig) -> None:
    """Runs `config.dp` encoders until SIGTERM or SIGINT, then stops them all.

    Raises:
        EncoderUnavailable: a rank ended before it ever served; there is no sense in starting it again.
        ValueError: fewer GPUs are visible than there are to be ranks.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ranks = [_Rank(config, rank) for rank in range(config.dp)]
    stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
    living = [asyncio.create_task(rank.keep_alive()) for rank in ranks]
    try:
        await asyncio.wait([stopping, *living], return_when=asyncio.FIRST_COMPLETED)
        for task in living:
            if task.done():
                raise EncoderUnavailable(f"{task.exception()}") from task.exception()
    finally:
        for task in (stopping, *living):
            task.cancel()
        await asyncio.gather(stopping, *living, return_exceptions=True)
        await asyncio.gather(*(rank.stop(config.drain_timeout_s + _STOP_MARGIN_S) for rank in ranks))


class _Rank:
    def __init__(self, config: EncoderConfig, rank: int) -> None:
        self._name = f"rank {rank}"
        self._environment = rank_environment(config, rank, os.environ)
        self._has_served = self._has_served_now = False
        self._child: Child | None = None

    async def keep_alive(self) -> None:
        """Starts the process, again and again.

        Raises:
            ChildFailed: it never served.
        """
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while True:
            self._has_served_now = False
            self._child = await Child.start(self._name, ["encoder_service"], self._environment, self._note_serving)
            failure = await self._child.failed()
            if not self._has_served:
                raise failure
            if self._has_served_now:
                backoff.reset()
            delay_s = backoff.next_s()
            _log.error("%s; starting it again in %.1f s", failure, delay_s)
            await asyncio.sleep(delay_s)

    async def stop(self, grace_s: float) -> None:
        if self._child is not None:
            await self._child.stop(grace_s)

    def _note_serving(self, line: str) -> None:
        if "SERVING " in line:
            self._has_served = self._has_served_now = True


def rank_environment(config: EncoderConfig, rank: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The settings of one rank as environment variables: ports that follow each other, one GPU of those visible.

    Args:
        environment: ours, which may restrict the visible GPUs already.

    Raises:
        ValueError: it leaves no GPU for this rank.
    """
    ports = {name: number + rank for name in ("port", "metrics_port") if (number := getattr(config, name))}
    settings = config.as_environment(dp=1, **ports)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        if config.device != "cpu" and 0 < (num_gpus := torch.cuda.device_count()) <= rank:
            raise ValueError(f"--dp {config.dp} is more than the {num_gpus} GPUs of this machine")
        return settings | {"CUDA_VISIBLE_DEVICES": str(rank)}
    if config.device == "cpu" or visible in _NO_GPU:
        return settings
    gpus = [each for each in visible.split(",") if each]
    if rank >= len(gpus):
        raise ValueError(f"--dp {config.dp} is more than the {len(gpus)} GPUs of CUDA_VISIBLE_DEVICES={visible}")
    return settings | {"CUDA_VISIBLE_DEVICES": gpus[rank]}
