"""An encoder as a Ray Serve replica: found by its address, scaled by its queue, replaced when it dies."""

from __future__ import annotations

from collections.abc import Mapping

from vitrine_vlm.deploy.ray_serve.config import environment_variables
from vitrine_vlm.deploy.ray_serve.node import free_ports, node_host
from vitrine_vlm.deploy.ray_serve.probes import grpc_serving, read_gauge
from vitrine_vlm.deploy.ray_serve.service_process import ServiceProcess
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.service_runtime.supervisor import Supervisor

QUEUE_SECONDS = "queue_seconds"


class EncoderReplica:
    """Answers Ray Serve's questions; pictures and rows go straight to and from the process, never through here."""

    async def __init__(self, environment: Mapping[str, str], stop_grace_s: float) -> None:  # type: ignore[misc]
        """Returns once the encoder serves; Ray Serve awaits it.

        Args:
            environment: the encoder's settings.
            stop_grace_s: how long it may drain.
        """
        self._stop_grace_s = stop_grace_s
        host = node_host()
        port, metrics_port = free_ports(host, 2)
        self._address = f"{host}:{port}"
        self._metrics_url = f"http://{host}:{metrics_port}/metrics"
        own = environment_variables(EncoderConfig, {"host": host, "port": port, "metrics_port": metrics_port})
        self._supervisor = Supervisor()
        self._process = await ServiceProcess.start(
            "vitrine_vlm.encoder_service", {**environment, **own}, self._supervisor
        )
        await self._process.wait_until(self._serving)

    async def address(self) -> str:
        """Where LLM workers connect to.

        Raises:
            ChildFailed: nowhere any more.
        """
        self._supervisor.check()
        return self._address

    async def record_replica_metadata(self) -> dict[str, str]:
        """What requests are routed by."""
        return {"address": self._address}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Queued patches by the patches a second that the encoder measured, as its cost model counts them."""
        return {QUEUE_SECONDS: await read_gauge(self._metrics_url, "vitrine_encoder_queue_seconds")}

    async def check_health(self) -> None:
        """
        Raises:
            ChildFailed: the encoder ended.
            RuntimeError: it does not answer, or not that it serves.
        """
        self._supervisor.check()
        if not await self._serving():
            raise RuntimeError(f"the encoder at {self._address} runs, but its gRPC health check does not say SERVING")

    async def __del__(self) -> None:
        """Ray Serve awaits it before it ends the actor: lets the encoder drain."""
        await self._process.stop(self._stop_grace_s)

    async def _serving(self) -> bool:
        return await grpc_serving(self._address)
