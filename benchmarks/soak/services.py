"""The services of a soak: encoders, LLM workers that all use them, and a gateway before the workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

from vitrine_vlm.deploy.launcher.stack import free_ports
from vitrine_vlm.deploy.ray_serve.probes import grpc_serving, http_ok

IsReady: TypeAlias = Callable[[], Awaitable[bool]]

_HOST = "127.0.0.1"
_START_TIMEOUT_S, _POLL_S = 120.0, 0.1
_STOP_GRACE_S = 40.0
_QUIET = ("--log-level", "warning")


class ServiceEnded(RuntimeError):
    """A service ended by itself, or was not ready in time."""


class Service:
    """One service at a fixed address, which can be killed and started again.

    pid: of the running process. num_starts: how often it was started.
    """

    def __init__(
        self, name: str, module: str, flags: list[str], is_ready: IsReady, metrics_url: str, log: Path
    ) -> None:
        """
        Args:
            is_ready: whether the service can be used. log: the service's output is appended to this file.
        """
        self.name = name
        self.metrics_url = metrics_url
        self.num_starts = 0
        self._command = (sys.executable, "-P", "-m", module, *flags, *_QUIET)
        self._is_ready = is_ready
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.num_starts += 1

    async def wait_ready(self) -> None:
        """
        Raises:
            ServiceEnded: it ended instead, or is not ready in time.
        """
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not await self._is_ready():
                    self.check_running()
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise ServiceEnded(f"{self.name} is not ready after {_START_TIMEOUT_S:g} s: see {self._log}") from None

    def check_running(self) -> None:
        """
        Raises:
            ServiceEnded: the service has ended by itself.
        """
        assert self._process is not None
        if self._process.returncode is not None:
            raise ServiceEnded(f"{self.name} ended with {self._process.returncode}: see {self._log}")

    async def kill(self) -> None:
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Has the service finish its requests; returns its exit status."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        try:
            return await asyncio.wait_for(self._process.wait(), _STOP_GRACE_S)
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()


class Services:
    """All services of a soak. Create it with `running`.

    url: the gateway's, without /v1; worker_urls: likewise. encoder_addresses: of gRPC, host:port.
    """

    def __init__(
        self, model: Path, num_encoders: int, num_workers: int, logs: Path, worker_flags: Sequence[str] = ()
    ) -> None:
        ports = free_ports(2 * num_encoders + 2 * num_workers + 2)
        of_encoders, of_metrics = ports[:num_encoders], ports[num_encoders : 2 * num_encoders]
        of_workers = ports[2 * num_encoders : 2 * num_encoders + num_workers]
        of_grpc = ports[2 * num_encoders + num_workers : -2]
        self.url = f"http://{_HOST}:{ports[-2]}"
        self.worker_urls = [f"http://{_HOST}:{port}" for port in of_workers]
        self.encoder_addresses = [f"{_HOST}:{port}" for port in of_encoders]
        encoders = ",".join(self.encoder_addresses)
        workers = ",".join(f"{_HOST}:{port}" for port in of_workers)
        self.encoders = [
            Service(
                f"encoder-{index}",
                "vitrine_vlm.encoder_service",
                ["--model", str(model), "--port", str(port), "--metrics-port", str(metrics_port)],
                partial(grpc_serving, f"{_HOST}:{port}"),
                f"http://{_HOST}:{metrics_port}/metrics",
                logs / f"encoder-{index}.log",
            )
            for index, (port, metrics_port) in enumerate(zip(of_encoders, of_metrics, strict=True))
        ]
        shared = ["--model", str(model), "--encoders", encoders, *worker_flags]
        self.workers = [
            Service(
                f"worker-{index}",
                "vitrine_vlm.llm_worker",
                [*shared, "--port", str(port), "--grpc-port", str(grpc_port)],
                partial(http_ok, f"http://{_HOST}:{port}/ready"),
                f"http://{_HOST}:{port}/metrics",
                logs / f"worker-{index}.log",
            )
            for index, (port, grpc_port) in enumerate(zip(of_workers, of_grpc, strict=True))
        ]
        flags = ["--servers", workers, "--health-path", "/ready", "--health-interval-s", "0.5"]
        flags += ["--port", str(ports[-2]), "--grpc-port", str(ports[-1])]
        is_ready, metrics = partial(http_ok, f"{self.url}/ready"), f"{self.url}/metrics"
        self.gateway = Service("gateway", "vitrine_vlm.gateway", flags, is_ready, metrics, logs / "gateway.log")

    @property
    def all(self) -> list[Service]:
        return [*self.encoders, *self.workers, self.gateway]

    @classmethod
    @asynccontextmanager
    async def running(
        cls, model: Path, num_encoders: int, num_workers: int, logs: Path, worker_flags: Sequence[str] = ()
    ) -> AsyncIterator[Services]:
        """Starts all inside the context, and stops them at its end.

        Args:
            worker_flags: more flags for each worker.

        Raises:
            ServiceEnded: see `Service.wait_ready`.
        """
        services = cls(model, num_encoders, num_workers, logs, worker_flags)
        started: list[Service] = []
        try:
            for service in services.all:
                await service.start()
                started.append(service)
            for service in services.all:
                await service.wait_ready()
            yield services
        finally:
            await asyncio.gather(*(service.stop() for service in started))
