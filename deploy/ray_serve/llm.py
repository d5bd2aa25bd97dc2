"""An LLM worker as a Ray Serve replica: connected to Ray Serve's encoders, scaled by its queue."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray.serve.handle import DeploymentHandle

from vitrine_vlm.deploy.ray_serve.autoscaling import LOAD
from vitrine_vlm.deploy.ray_serve.broadcasts import answers_of_all
from vitrine_vlm.deploy.ray_serve.closing import Closing
from vitrine_vlm.deploy.ray_serve.config import environment_variables
from vitrine_vlm.deploy.ray_serve.encoder import EncoderReplica
from vitrine_vlm.deploy.ray_serve.metrics_targets import LLM_JOB, MetricsTarget, metrics_target
from vitrine_vlm.deploy.ray_serve.node import free_ports, node_host, num_gpus_of_node
from vitrine_vlm.deploy.ray_serve.placement import warn_of_shortages
from vitrine_vlm.deploy.ray_serve.probes import http_ok, read_gauges
from vitrine_vlm.deploy.ray_serve.service_log import LOG_FORMAT
from vitrine_vlm.deploy.ray_serve.service_process import ServiceProcess
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.service_runtime.supervisor import Supervisor

QUEUED_TOKENS = "queued_prefill_tokens"
_ADDRESS_INTERVAL_S = 1.0
_ADDRESS_TIMEOUT_S = 5.0

_log = logging.getLogger("ray.serve")


class LlmReplica(Closing):
    """Reports to Ray Serve; prompts and tokens go directly to and from the service process."""

    async def __init__(  # type: ignore[misc]
        self,
        environment: Mapping[str, str],
        stop_grace_s: float,
        needed: Mapping[str, float],
        encoders: DeploymentHandle[EncoderReplica],
    ) -> None:
        """Returns once the worker serves and is connected to an encoder; Ray Serve awaits it.

        Args:
            environment: the worker's settings.
            stop_grace_s: seconds that the worker may drain.
            needed: see `warn_of_shortages`.
        """
        warn_of_shortages(needed)
        self._stop_grace_s = stop_grace_s
        host = node_host()
        port, grpc_port, metrics_port = free_ports(host, 3)
        self._address = f"{host}:{port}"
        self._metrics_address = f"{host}:{metrics_port}"
        self._metrics_url = f"http://{self._metrics_address}/metrics"
        self._folder = tempfile.TemporaryDirectory(prefix="vitrine-encoders-")
        addresses = Path(self._folder.name) / "addresses"
        addresses.touch()
        self._supervisor = Supervisor()
        self._supervisor.start_task("encoder addresses", _update_addresses(encoders, addresses))
        ports = {"port": port, "grpc_port": grpc_port, "metrics_port": metrics_port}
        chosen = {"host": host, **ports, "encoders": f"file:{addresses}", "log_format": LOG_FORMAT}
        own = environment_variables(LlmConfig, chosen)
        own |= gpu_environment(ray.get_gpu_ids(), num_gpus_of_node())
        self._process = await ServiceProcess.start("vitrine_vlm.llm_worker", {**environment, **own}, self._supervisor)
        await self._process.wait_until(lambda: http_ok(f"http://{self._address}/ready"))

    async def record_replica_metadata(self) -> dict[str, str]:
        """Returns the address to which the gateway sends requests, and that of metrics and dashboard."""
        return {"address": self._address, "metrics": self._metrics_address}

    async def metrics_target(self) -> MetricsTarget:
        """Returns where Prometheus finds this worker's metrics."""
        return metrics_target(LLM_JOB, self._metrics_address)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the number of prompt tokens that are not computed yet, and the worker's load, see `EngineStats`."""
        names = ["vitrine_llm_queued_prefill_tokens", "vitrine_llm_load"]
        tokens, load = await read_gauges(self._metrics_url, names)
        return {QUEUED_TOKENS: tokens, LOAD: load}

    async def check_health(self) -> None:
        """Checks that the worker answers. It need not be ready: a new replica would have no encoder, either.

        Raises:
            ChildFailed: the worker ended.
            RuntimeError: the worker does not answer.
            OSError: the file of encoder addresses cannot be written.
        """
        self._supervisor.check()
        if not await http_ok(f"http://{self._address}/health"):
            raise RuntimeError(f"the LLM worker at {self._address} runs, but /health does not answer")

    async def close(self) -> None:
        """Drains the worker."""
        await self._process.stop(self._stop_grace_s)
        await self._supervisor.close()
        self._folder.cleanup()


def gpu_environment(own: Sequence[int | str], num_on_node: int) -> dict[str, str]:
    """Returns variables that make all GPUs of the node visible, the worker's own first, on which it runs.

    Ray hides the others, and with them the memory of their encoders, which the worker reads through CUDA IPC.
    """
    names = [str(each) for each in own]
    if not names or not all(name.isdecimal() for name in names):
        return {}
    others = [str(number) for number in range(num_on_node) if str(number) not in names]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names + others)}


async def _update_addresses(encoders: DeploymentHandle[EncoderReplica], file: Path) -> None:
    """Keeps the addresses of the running encoders in `file`, one per line, from which the worker reads them."""
    known: list[str] | None = None
    while True:
        addresses = await _addresses(encoders)
        # If no encoder answers, the addresses stay: the worker itself notices which encoders are lost.
        if addresses and addresses != known:
            _log.info("encoders: %s", ", ".join(addresses))
            _replace(file, "".join(f"{address}\n" for address in addresses))
            known = addresses
        await asyncio.sleep(_ADDRESS_INTERVAL_S)


async def _addresses(encoders: DeploymentHandle[EncoderReplica]) -> list[str]:
    answers = await answers_of_all(encoders, "address", _ADDRESS_TIMEOUT_S)
    return sorted(answer for answer in answers if isinstance(answer, str))


def _replace(file: Path, text: str) -> None:
    """Replaces the file atomically: a reader sees the old text or the new one."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)
