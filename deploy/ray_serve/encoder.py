"""An encoder as a Ray Serve replica: discovered by its address, scaled by its queue, replaced when it dies."""

from __future__ import annotations

from collections.abc import Mapping

from vitrine_vlm.deploy.ray_serve.autoscaling import LOAD
from vitrine_vlm.deploy.ray_serve.closing import Closing
from vitrine_vlm.deploy.ray_serve.config import environment_variables
from vitrine_vlm.deploy.ray_serve.metrics_targets import ENCODER_JOB, MetricsTarget, metrics_target
from vitrine_vlm.deploy.ray_serve.node import free_ports, node_host
from vitrine_vlm.deploy.ray_serve.placement import warn_of_shortages
from vitrine_vlm.deploy.ray_serve.probes import grpc_serving, read_gauges
from vitrine_vlm.deploy.ray_serve.service_log import LOG_FORMAT
from vitrine_vlm.deploy.ray_serve.service_process import ServiceProcess
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.service_runtime.supervisor import Supervisor

QUEUE_SECONDS = "queue_seconds"


class EncoderReplica(Closing):
    """Reports to Ray Serve; pictures and rows go directly to and from the service process."""

    async def __init__(  # type: ignore[misc]
        self, environment: Mapping[str, str], stop_grace_s: float, needed: Mapping[str, float]
    ) -> None:
        """Returns once the encoder serves; Ray Serve awaits it.

        Args:
            environment: the encoder's settings.
            stop_grace_s: seconds that the encoder may drain.
            needed: see `warn_of_shortages`.
        """
        warn_of_shortages(needed)
        self._stop_grace_s = stop_grace_s
        host = node_host()
        port, metrics_port = free_ports(host, 2)
        self._address = f"{host}:{port}"
        self._metrics_address = f"{host}:{metrics_port}"
        self._metrics_url = f"http://{self._metrics_address}/metrics"
        addresses = {"host": host, "port": port, "metrics_port": metrics_port}
        own = environment_variables(EncoderConfig, addresses | {"log_format": LOG_FORMAT})
        self._supervisor = Supervisor()
        self._process = await ServiceProcess.start(
            "vitrine_vlm.encoder_service", {**environment, **own}, self._supervisor
        )
        await self._process.wait_until(self._serving)

    async def address(self) -> str:
        """Returns the address for LLM workers.

        Raises:
            ChildFailed: the encoder ended.
        """
        self._supervisor.check()
        return self._address

    async def record_replica_metadata(self) -> dict[str, str]:
        """Returns the address, by which requests are routed."""
        return {"address": self._address}

    async def metrics_target(self) -> MetricsTarget:
        """Returns where Prometheus finds this encoder's metrics."""
        return metrics_target(ENCODER_JOB, self._metrics_address)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the seconds of queued work, by the encoder's measured cost model, and the tower's load."""
        names = ["vitrine_encoder_queue_seconds", "vitrine_encoder_load"]
        queue_s, load = await read_gauges(self._metrics_url, names)
        return {QUEUE_SECONDS: queue_s, LOAD: load}

    async def check_health(self) -> None:
        """Checks that the encoder serves.

        Raises:
            ChildFailed: the encoder ended.
            RuntimeError: the encoder does not answer, or is not SERVING.
        """
        self._supervisor.check()
        if not await self._serving():
            raise RuntimeError(f"the encoder at {self._address} runs, but its gRPC health check is not SERVING")

    async def close(self) -> None:
        """Drains the encoder."""
        await self._process.stop(self._stop_grace_s)

    async def _serving(self) -> bool:
        return await grpc_serving(self._address)
