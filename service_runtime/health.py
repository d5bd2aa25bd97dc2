"""What grpc.health.v1 says of a service."""

from __future__ import annotations

from grpc_health.v1 import health_pb2, health_pb2_grpc

from vitrine_vlm.service_runtime.grpc_channel import open_channel
from vitrine_vlm.service_runtime.tls import ClientTls


async def health_status(address: str, timeout_s: float, service: str = "", tls: ClientTls | None = None) -> str:
    """ "SERVING", "NOT_SERVING" or another name of its statuses.

    Args:
        service: full name of one service; all there are by default.

    Raises:
        grpc.aio.AioRpcError: nothing answers, or the service is not known there.
        OSError: a file of `tls` cannot be read.
    """
    async with open_channel(address, tls) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    return name
