"""The application's ingress, to which Ray Serve's HTTP and gRPC proxies send requests.

Rows for LLM workers do not pass through it. Those of Encode calls from outside do, and through Ray Serve's proxy, which
is slow: clients that need many rows should connect to encoders directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vitrine_vlm.deploy.ray_serve.all_metrics import AllMetrics
from vitrine_vlm.deploy.ray_serve.closing import Closing
from vitrine_vlm.deploy.ray_serve.encode_forwarder import EncodeForwarder
from vitrine_vlm.deploy.ray_serve.encoder import EncoderReplica
from vitrine_vlm.deploy.ray_serve.http_forwarder import PROBES, HttpForwarder, path_of
from vitrine_vlm.deploy.ray_serve.llm import LlmReplica
from vitrine_vlm.deploy.ray_serve.metrics_targets import all_targets
from vitrine_vlm.deploy.ray_serve.placement import outlive, warn_of_shortages, watch
from vitrine_vlm.embedding_transport.wire.grpc_status import STATUS_BY_CODE
from vitrine_vlm.errors import TransportUnavailable, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.access_settings import AccessSettings
from vitrine_vlm.service_runtime.http_errors import error_response
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tenants import current_tenant
from vitrine_vlm.service_runtime.traces import metadata_carrier

METRICS, METRICS_TARGETS = "/metrics", "/metrics/targets"
ENCODER_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name
_CHECK_TIMEOUT_S = 5.0
_TRACE_CONTEXT = ("traceparent", "tracestate")
_ONE_ENCODER = TransportUnavailable(
    "this call is for one encoder, and there may be several: connect to that encoder directly"
)


class Gateway(Closing):
    def __init__(
        self,
        encoders: DeploymentHandle[EncoderReplica],
        workers: DeploymentHandle[LlmReplica],
        max_items: int,
        retry_s: float,
        keys_file: str | None = None,
        tenant_header: str | None = None,
        needed: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            max_items: the most media items accepted in one Encode.
            retry_s: seconds that a request waits for another replica if one died.
            keys_file: the API keys of both doors, those of the workers.
            tenant_header: as the workers'.
            needed: see `warn_of_shortages`; None without Ray.
        """
        settings = AccessSettings(api_keys_file=Path(keys_file) if keys_file else None, tenant_header=tenant_header)
        self._access = settings.make_access(CollectorRegistry(), "vitrine_ray_gateway")
        self._supervisor = Supervisor()
        self._access.start(self._supervisor)
        self._application: str | None = None
        if needed is not None:
            warn_of_shortages(needed)
            self._application = serve.get_replica_context().app_name
            self._supervisor.start_task("placement", watch(self._application))
        self._encoders, self._workers = encoders, workers
        self._encoding = EncodeForwarder(encoders, max_items, retry_s)
        self._http = HttpForwarder(workers, retry_s)
        self._metrics = AllMetrics([encoders, workers])

    async def close(self) -> None:
        """Closes the HTTP client."""
        await self._http.close()
        await self._supervisor.close()
        if self._application is not None:
            await asyncio.to_thread(outlive, self._application)

    def check_health(self) -> None:
        """Checks that changes of the keys are noticed; Ray Serve replaces a gateway of which this fails.

        Raises:
            Exception: why they are not.
        """
        self._supervisor.check()

    async def __call__(self, request: Request) -> Response:
        """Answers a request over HTTP."""
        path = path_of(request)
        if path == METRICS_TARGETS:
            return JSONResponse(await all_targets([self._encoders, self._workers]))
        if path == METRICS:
            return _Forwarded(self._metrics, self._access, request)
        if path in PROBES:
            return _Forwarded(self._http, Access(), request)
        return _Forwarded(self._http, self._access, request)

    # The methods of vitrine.encoder.v1.Encoder; Ray Serve finds them by their names.

    async def Describe(
        self, request: encoder_pb2.DescribeRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.DescribeResponse:
        try:
            with self._admitted(grpc_context):
                return await self._encoding.describe()
        except VitrineError as error:
            _fail(grpc_context, error)

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse]:
        metadata = [pair for pair in grpc_context.invocation_metadata() if pair[0] in _TRACE_CONTEXT]
        try:
            with self._admitted(grpc_context):
                if self._access.has_tenants:
                    request.tenant = current_tenant()  # not the one that the caller chose
                async with aclosing(self._encoding.encode(request, metadata)) as responses:
                    async for response in responses:
                        yield response
        except VitrineError as error:
            _fail(grpc_context, error)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """Answers grpc.health.v1: SERVING while an encoder does."""
        if request.service not in ("", ENCODER_SERVICE):
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            raise ValueError(f"no service {request.service!r}")
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                await self._encoding.describe()
        except (VitrineError, DeploymentUnavailableError, TimeoutError):
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Connect(
        self, requests: object, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[encoder_pb2.ConnectResponse]:
        _fail(grpc_context, _ONE_ENCODER)
        yield encoder_pb2.ConnectResponse()  # type: ignore[unreachable]  # makes it a generator

    async def Release(self, request: object, grpc_context: RayServegRPCContext) -> NoReturn:
        _fail(grpc_context, _ONE_ENCODER)

    async def GetStats(self, request: object, grpc_context: RayServegRPCContext) -> NoReturn:
        _fail(grpc_context, _ONE_ENCODER)

    @contextmanager
    def _admitted(self, grpc_context: RayServegRPCContext) -> Iterator[None]:
        """The time of one call.

        Raises:
            VitrineError: see `Access.begin`.
        """
        end = self._access.begin(metadata_carrier(grpc_context.invocation_metadata()))
        try:
            yield
        finally:
            end()


class _Forwarded(Response):
    """Replicas' answer. They are called when this is sent, so that cancelling the response cancels the calls."""

    def __init__(self, forwarder: HttpForwarder | AllMetrics, access: Access, request: Request) -> None:
        super().__init__()
        self._forwarder, self._access, self._request = forwarder, access, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The worker checks, too: it knows the media. Here a stranger's body is not even read.
        try:
            end = self._access.begin(self._request.headers)
        except VitrineError as error:
            refused = error_response(error)
            return await Response(refused.text, refused.status, dict(refused.headers))(scope, receive, send)
        try:
            await self._forwarder.forward(self._request, send)
        finally:
            end()


def _fail(context: RayServegRPCContext, error: VitrineError) -> NoReturn:
    """Ends the call with the error's status, which Ray Serve reads from the context when an error is raised."""
    context.set_code(STATUS_BY_CODE[error.code])
    context.set_details(f"{error.code}: {error}")
    raise error
