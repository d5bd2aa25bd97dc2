"""Forwards OpenAI requests to an LLM worker, and to another one if that dies before it answers."""

from __future__ import annotations

import asyncio
import os
from urllib.parse import quote

import aiohttp
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Send
from yarl import URL

from vitrine_vlm.deploy.ray_serve.llm import LlmReplica
from vitrine_vlm.errors import BadRequest, WorkerUnavailable
from vitrine_vlm.service_runtime.retry import Attempts, RetryPolicy

_PATHS = "/v1/"
# Of any worker, without a key and without another attempt.
PROBES = frozenset(["/health", "/ready", "/version"])
_PROBE_TIMEOUT_S = 5.0
# On the port of a worker's metrics. All of its requests go to one worker, as long as that has no more load than others.
_DASHBOARD = "/dashboard"
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)
# Headers of one connection, which are not forwarded.
_HOP_BY_HOP = frozenset(
    ["connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"]
)
_UNAVAILABLE = 503  # the answer of LLM workers to requests that may succeed a moment later


class HttpForwarder:
    """Forwards requests to LLM workers. Create it on the event loop on which it is used.

    Args:
        workers: replicas that ContentRouter chooses from.
        retry_s: seconds that a request waits for another worker, or another encoder of a worker, if one died.
    """

    def __init__(self, workers: DeploymentHandle[LlmReplica], retry_s: float) -> None:
        self._workers = workers
        self._policy = RetryPolicy((_WorkerUnavailable,), retry_s)
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, auto_decompress=False)

    async def close(self) -> None:
        await self._session.close()

    async def forward(self, request: Request, send: Send) -> None:
        """Sends a worker's answer as it arrives. If the worker is lost in the middle of it, the answer is truncated."""
        path = path_of(request)
        if path in PROBES:
            return await self._probe(path, request, send)
        is_dashboard = path == _DASHBOARD or path.startswith(f"{_DASHBOARD}/")
        if not (path.startswith(_PATHS) or is_dashboard) or ".." in path.split("/"):
            served = f"probes, /metrics, {_DASHBOARD} and paths below {_PATHS}"
            message = f"{request.method} {path}: only {served} are served here"
            return await _error(404, BadRequest.code, message)(request.scope, request.receive, send)
        body = await request.body()
        attempts = Attempts(self._policy)
        while True:
            # Any worker: a request does not tell which worker has its beginning in the prefix cache.
            key = _DASHBOARD.encode() if is_dashboard else os.urandom(8)
            async with self._workers.choose_replica(key, sorted(attempts.failures)) as replica:
                address = replica.replica_metadata["metrics" if is_dashboard else "address"]
                try:
                    return await self._attempt(address, path, request, body, send)
                except attempts.elsewhere as error:
                    attempts.failed(address, error)
            if not await attempts.pause():
                return await attempts.failures[address].answer(request.scope, request.receive, send)

    async def _probe(self, path: str, request: Request, send: Send) -> None:
        """Sends one worker's answer, or 503 if there is none in time: a probe must not wait for a replica to come."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S), self._workers.choose_replica(os.urandom(8), []) as replica:
                return await self._attempt(replica.replica_metadata["address"], path, request, b"", send)
        except _WorkerUnavailable as error:
            answer = error.answer
        except (TimeoutError, DeploymentUnavailableError):
            answer = _error(_UNAVAILABLE, WorkerUnavailable.code, "no LLM worker serves; try again")
        return await answer(request.scope, request.receive, send)

    async def _attempt(self, address: str, path: str, request: Request, body: bytes, send: Send) -> None:
        """Sends one worker's answer.

        Raises:
            _WorkerUnavailable: the worker failed before anything was sent.
        """
        # `path` has been unquoted and is quoted again here, so that it cannot change the rest of the URL.
        query = request.url.query
        url = URL.build(scheme="http", authority=address, path=quote(path), query_string=query, encoded=True)
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        try:
            answer = await self._session.request(request.method, url, headers=headers, data=body)
            if answer.status == _UNAVAILABLE:
                retry_after = {"Retry-After": answer.headers.get("Retry-After", "1")}
                raise _WorkerUnavailable(Response(await answer.read(), answer.status, retry_after, answer.content_type))
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            lost = _error(_UNAVAILABLE, WorkerUnavailable.code, f"the LLM worker was lost: {error!r}; try again")
            raise _WorkerUnavailable(lost) from error
        async with answer:
            raw_headers = [each for each in answer.raw_headers if each[0].decode().lower() not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": answer.status, "headers": raw_headers})
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


class _WorkerUnavailable(Exception):
    """Another worker may serve the request. `answer` is the client's response if this was the last attempt."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer


def path_of(request: Request) -> str:
    """Returns the path below the application's route prefix."""
    return str(request.scope["path"]).removeprefix(request.scope.get("root_path", ""))


def _error(status: int, code: str, message: str) -> Response:
    """Returns an error in OpenAI's format."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)
