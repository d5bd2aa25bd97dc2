"""Data parallel: one encoder process a GPU, each with a port of its own. This process starts a rank that ends again.

The ranks do not communicate. A client that has all their addresses spreads the items of a request over them, receives
each item's rows from the rank that computed them, and uses the others while one is down.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import grpc
import torch

from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.service_runtime.child_process import Child, ChildFailed
from vitrine_vlm.service_runtime.health import health_status
from vitrine_vlm.service_runtime.lifecycle import EXIT_MARGIN_S
from vitrine_vlm.service_runtime.supervisor import Supervisor

_log = logging.getLogger(__name__)
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
_HEALTH_INTERVAL_S, _HEALTH_TIMEOUT_S = 0.2, 2.0
_PORTS = ("port", "metrics_port", "sglang_port")
# Values of CUDA_VISIBLE_DEVICES that hide all.
_NO_GPU = ("", "-1")


async def serve_ranks(config: EncoderConfig) -> None:
    """Runs `config.dp` encoders until SIGTERM or SIGINT, then stops them all.

    Raises:
        EncoderUnavailable: a rank ended before it ever served, so that starting it again would not help.
        ValueError: fewer GPUs are visible than `config.dp`.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    supervisor = Supervisor()
    with tempfile.TemporaryDirectory(prefix="vitrine-ranks-") as folder:
        ranks = [_Rank(config, rank, Path(folder), supervisor) for rank in range(config.dp)]
        for rank in ranks:
            supervisor.start_task(rank.name, rank.supervise())
        try:
            await supervisor.unless_failed(stop.wait())
        except ChildFailed as error:
            raise EncoderUnavailable(f"{error}") from error
        finally:
            await supervisor.close()
            # Each has this long after its signal to end by itself; then it is killed.
            await asyncio.gather(*(rank.stop(config.drain_timeout_s + EXIT_MARGIN_S) for rank in ranks))


class _Rank:
    def __init__(self, config: EncoderConfig, rank: int, folder: Path, supervisor: Supervisor) -> None:
        """
        Args:
            folder: where the rank's health socket is made.
        """
        self.name = f"rank {rank}"
        self._health_socket = folder / f"{rank}.sock"
        config = config.model_copy(update={"health_socket": self._health_socket})
        self._environment = rank_environment(config, rank, os.environ)
        self._supervisor = supervisor
        self._has_served = self._has_served_now = False
        self._child: Child | None = None

    async def supervise(self) -> None:
        """Starts the process, and starts it again each time it has ended.

        Raises:
            ChildFailed: it never served.
        """
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while True:
            self._has_served_now = False
            self._child = await Child.start(self.name, ["vitrine_vlm.encoder_service"], self._environment)
            polling = self._supervisor.start_job(f"{self.name} health", self._poll_health())
            failure = await self._child.failed()
            await self._supervisor.stop(polling)
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

    async def _poll_health(self) -> None:
        while not self._has_served_now:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            with suppress(grpc.aio.AioRpcError):  # the rank does not listen yet, or is ending
                status = await health_status(f"unix:{self._health_socket}", _HEALTH_TIMEOUT_S)
                self._has_served_now = status == "SERVING"
        self._has_served = True


def rank_environment(config: EncoderConfig, rank: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The settings of one rank as environment variables: consecutive ports, one of the visible GPUs.

    Args:
        environment: of this process, which may restrict the visible GPUs already.

    Raises:
        ValueError: `environment` or the machine leaves no GPU for this rank.
    """
    ports = {name: number + rank for name in _PORTS if (number := getattr(config, name))}
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
