"""The application's ingress, to which Ray Serve's HTTP and gRPC proxies send requests.

Rows for LLM workers do not pass through it. Those of Encode calls from outside do, and through Ray Serve's proxy, which
is slow: clients that need many rows should connect to encoders directly.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NoReturn

from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vitrine_vlm.deploy.ray_serve.encode_forwarder import EncodeForwarder
from vitrine_vlm.deploy.ray_serve.encoder import EncoderReplica
from vitrine_vlm.deploy.ray_serve.http_forwarder import HttpForwarder
from vitrine_vlm.deploy.ray_serve.llm import LlmReplica
from vitrine_vlm.embedding_transport.wire.grpc_status import STATUS_BY_CODE
from vitrine_vlm.errors import TransportUnavailable, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2

_TRACE_CONTEXT = ("traceparent", "tracestate")
_ONE_ENCODER = TransportUnavailable(
    "this call is for one encoder, and there may be several: connect to that encoder directly"
)


class Gateway:
    def __init__(
        self,
        encoders: DeploymentHandle[EncoderReplica],
        workers: DeploymentHandle[LlmReplica],
        max_items: int,
        retry_s: float,
    ) -> None:
        """
        Args:
            max_items: the most media items accepted in one Encode.
            retry_s: seconds that a request waits for another replica if one died.
        """
        self._encoding = EncodeForwarder(encoders, max_items, retry_s)
        self._http = HttpForwarder(workers, retry_s)

    async def __del__(self) -> None:
        """Closes the HTTP client; Ray Serve awaits this before it ends the actor."""
        await self._http.close()

    async def __call__(self, request: Request) -> Response:
        """Answers an OpenAI request over HTTP."""
        return _Forwarded(self._http, request)

    # The methods of vitrine.encoder.v1.Encoder; Ray Serve finds them by their names.

    async def Describe(
        self, request: encoder_pb2.DescribeRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.DescribeResponse:
        try:
            return await self._encoding.describe()
        except VitrineError as error:
            _fail(grpc_context, error)

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[encoder_pb2.EncodeResponse]:
        metadata = [pair for pair in grpc_context.invocation_metadata() if pair[0] in _TRACE_CONTEXT]
        try:
            async with aclosing(self._encoding.encode(request, metadata)) as responses:
                async for response in responses:
                    yield response
        except VitrineError as error:
            _fail(grpc_context, error)

    async def Connect(
        self, requests: object, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[encoder_pb2.ConnectResponse]:
        _fail(grpc_context, _ONE_ENCODER)
        yield encoder_pb2.ConnectResponse()  # type: ignore[unreachable]  # makes it a generator

    async def Release(self, request: object, grpc_context: RayServegRPCContext) -> NoReturn:
        _fail(grpc_context, _ONE_ENCODER)

    async def GetStats(self, request: object, grpc_context: RayServegRPCContext) -> NoReturn:
        _fail(grpc_context, _ONE_ENCODER)


class _Forwarded(Response):
    """A worker's answer. The worker is called when this is sent, so that cancelling the response cancels the call."""

    def __init__(self, forwarder: HttpForwarder, request: Request) -> None:
        super().__init__()
        self._forwarder, self._request = forwarder, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._forwarder.forward(self._request, send)


def _fail(context: RayServegRPCContext, error: VitrineError) -> NoReturn:
    """Ends the call with the error's status, which Ray Serve reads from the context when an error is raised."""
    context.set_code(STATUS_BY_CODE[error.code])
    context.set_details(f"{error.code}: {error}")
    raise error
