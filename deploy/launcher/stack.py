"""Encoders and one LLM worker on this machine, as separate processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from vitrine_vlm.deploy.launcher.mps import Mps
from vitrine_vlm.service_runtime.child_process import Child
from vitrine_vlm.service_runtime.supervisor import Supervisor

_HOST = "127.0.0.1"
_POLL_INTERVAL_S = 0.1
# For all services together, and at least this long for each.
_STOP_GRACE_S, _MIN_STOP_GRACE_S = 10.0, 1.0
# By default the worker leaves half of the GPU to the encoders.
_SHARED_GPU = {"VITRINE_LLM_GPU_MEMORY_UTILIZATION": "0.5"}

T = TypeVar("T")


class Stack:
    """The running services. Create it with `running`.

    base_url: the worker's HTTP endpoint, without /v1; grpc_address: its gRPC endpoint. mps: what they share GPUs by,
    None if they take turns.
    """

    def __init__(
        self, base_url: str, grpc_address: str, mps: Mps | None, supervisor: Supervisor, children: Sequence[Child]
    ) -> None:
        self.base_url = base_url
        self.grpc_address = grpc_address
        self.mps = mps
        self._supervisor = supervisor
        self._children = children

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        model: str | Path,
        port: int | None = None,
        grpc_port: int | None = None,
        num_encoders: int = 1,
        dp: int = 1,
        encoder_flags: Sequence[str] = (),
        worker_flags: Sequence[str] = (),
        encoder_environment: Mapping[str, str] | None = None,
        worker_environment: Mapping[str, str] | None = None,
        may_use_mps: bool = True,
    ) -> AsyncIterator[Stack]:
        """Starts all services at once inside the context and stops them at its end, also after errors.

        Args:
            model: checkpoint folder or hub id.
            port, grpc_port: HTTP and gRPC port of the LLM worker; None for a free one.
            dp: ranks of each encoder.
            encoder_flags, worker_flags: more flags for every encoder and for the LLM worker.
            encoder_environment, worker_environment: variables to add to this process's, for instance to assign GPUs.
            may_use_mps: False if services without such variables are to take turns on the GPUs that they share.
        """
        free_http_port, free_grpc_port = free_ports(2)
        port = free_http_port if port is None else port
        grpc_port = free_grpc_port if grpc_port is None else grpc_port
        encoder_ports = [free_ports(dp, in_a_row=True)[0] for _ in range(num_encoders)]
        share_gpus = may_use_mps and not (encoder_environment or worker_environment)
        async with Mps.running() if share_gpus else contextlib.nullcontext() as mps:
            shared = mps.environment if mps else {}
            children: list[Child] = []
            supervisor = Supervisor()
            try:
                for index, encoder_port in enumerate(encoder_ports):
                    name = "encoder" if num_encoders == 1 else f"encoder {index}"
                    encoder = ["vitrine_vlm.encoder_service", "--model", str(model)]
                    encoder += ["--port", str(encoder_port), "--dp", str(dp)]
                    encoder += encoder_flags
                    children.append(await Child.start(name, encoder, encoder_environment or shared))
                encoders = ",".join(f"{_HOST}:{first}-{first + dp - 1}" for first in encoder_ports)
                worker = ["vitrine_vlm.llm_worker", "--model", str(model), "--encoders", encoders]
                ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
                environment = {**_SHARED_GPU, **os.environ, **(worker_environment or shared)}
                children.append(await Child.start("llm", [*worker, *ports, *worker_flags], environment))
                for child in [*children, mps.daemon] if mps else children:
                    supervisor.watch_child(child)
                yield cls(f"http://{_HOST}:{port}", f"{_HOST}:{grpc_port}", mps, supervisor, children)
            finally:
                await supervisor.close()
                deadline = time.monotonic() + _STOP_GRACE_S
                # The worker first: it releases its leases while the encoders still listen.
                for child in reversed(children):
                    await child.stop(max(_MIN_STOP_GRACE_S, deadline - time.monotonic()))

    async def wait_ready(self) -> None:
        """Returns once the worker has loaded and is connected to the encoder.

        There is no time limit: a large checkpoint may take long to download.

        Raises:
            ChildFailed: a service ended instead.
        """
        await self.unless_failed(self._poll_ready())

    @contextlib.contextmanager
    def output_held(self) -> Iterator[None]:
        """See `Child.output_held`, of all services."""
        with contextlib.ExitStack() as stack:
            for child in self._children:
                stack.enter_context(child.output_held())
            yield

    async def unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns the result of `work`, which is cancelled as soon as a service ends by itself.

        Raises:
            ChildFailed: names the service that ended.
        """
        return await self._supervisor.unless_failed(work)

    async def _poll_ready(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientConnectionError):
                    async with session.get(f"{self.base_url}/ready") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_POLL_INTERVAL_S)


def free_ports(count: int, *, in_a_row: bool = False) -> list[int]:
    while True:
        with contextlib.ExitStack() as stack:
            # All are open at the same time, so that no port is returned twice.
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            sockets[0].bind((_HOST, 0))
            first = int(sockets[0].getsockname()[1])
            try:
                for offset, one in enumerate(sockets[1:], start=1):
                    one.bind((_HOST, first + offset if in_a_row else 0))
            except (OSError, OverflowError):  # in use, or above the last port: try another first port
                continue
            return [int(one.getsockname()[1]) for one in sockets]
