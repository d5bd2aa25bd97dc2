"""A client of grpc.health.v1."""

from __future__ import annotations

from grpc_health.v1 import health_pb2, health_pb2_grpc

from vitrine_vlm.service_runtime.grpc_channel import open_channel
from vitrine_vlm.service_runtime.tls import ClientTls


async def health_status(address: str, timeout_s: float, service: str = "", tls: ClientTls | None = None) -> str:
    """Returns "SERVING", "NOT_SERVING" or another name of a status.

    Args:
        service: the full name of one service; by default all services of the server.

    Raises:
        grpc.aio.AioRpcError: no server answers, or it does not know the service.
        OSError: a file of `tls` cannot be read.
    """
    async with open_channel(address, tls) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    return name
