"""The HTTP endpoints that SGLang's language servers ask: /encode, /scheduler_receive_url, /health."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from aiohttp import web

from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.sglang.bodies import EncodeBody, ReceiverBody, read_body, split_receive_url
from vitrine_vlm.encoder_service.sglang.frames import Frame, PartId, error_message, http_status, rows_message
from vitrine_vlm.encoder_service.sglang.media_items import media_items
from vitrine_vlm.encoder_service.sglang.part_encoder import PartEncoder
from vitrine_vlm.encoder_service.sglang.parts import Part, PartTable
from vitrine_vlm.encoder_service.sglang.receivers import AllowedReceivers
from vitrine_vlm.encoder_service.sglang.versions import ReceiverClass
from vitrine_vlm.encoder_service.sglang.zmq_push import ZmqPush
from vitrine_vlm.errors import BadRequest, EncoderUnavailable, InternalError, VitrineError, as_vitrine_error
from vitrine_vlm.service_runtime.access_log import report
from vitrine_vlm.service_runtime.byte_budget import ByteBudget, Reserve
from vitrine_vlm.service_runtime.http_requests import traced
from vitrine_vlm.service_runtime.logs import harmless, set_request_id
from vitrine_vlm.service_runtime.running_calls import RunningCalls

_log = logging.getLogger(__name__)
_MAX_BODY_NBYTES = 256 * 1024 * 1024
_MAX_RECEIVER_BODY_NBYTES = 16 * 1024
# Of the current request, once its body is read.
_req_id: ContextVar[str | None] = ContextVar("req_id", default=None)


@dataclass(frozen=True)
class Delivery:
    """How parts reach their receivers."""

    receiver: ReceiverClass
    allowed: AllowedReceivers
    push: ZmqPush
    timeout_s: float


class SglangHttp:
    """Handlers of the port. Until `open` is called everything is answered with 503.

    Args:
        reason_to_refuse: returns why no part is served any more; empty while they are.
        budget: bounds the bytes of all bodies and rows in memory.
    """

    def __init__(
        self,
        delivery: Delivery,
        calls: RunningCalls,
        budget: ByteBudget,
        metrics: EncoderMetrics,
        reason_to_refuse: Callable[[], str],
    ) -> None:
        self._delivery = delivery
        self._calls = calls
        self._budget = budget
        self._metrics = metrics
        self._reason_to_refuse = reason_to_refuse
        self._parts = PartTable(delivery.timeout_s)
        self._encoder: PartEncoder | None = None
        self._loader: MediaLoader | None = None
        self._model = ""

    def open(self, encoder: PartEncoder, loader: MediaLoader, model: str) -> None:
        """Begins to serve parts of this model."""
        self._encoder, self._loader, self._model = encoder, loader, model

    def application(self) -> web.Application:
        app = web.Application(middlewares=[traced, _errors_as_sglang])
        app.router.add_post("/encode", self._encode)
        app.router.add_post("/scheduler_receive_url", self._register_receiver)
        app.router.add_get("/health", self._health)
        app.router.add_get("/health_generate", self._health)
        for path in ("/send", "/scheduler_receive_meta_data"):
            app.router.add_post(path, _refuse_mooncake)
        return app

    async def _health(self, http: web.Request) -> web.Response:
        reason = self._reason_to_refuse() or ("" if self._encoder is not None else "loading the model")
        return web.Response(text=reason or "OK", status=503 if reason else 200)

    async def _register_receiver(self, http: web.Request) -> web.Response:
        # Also while the service ends: parts in work still need their receivers.
        async with self._until(time.monotonic() + self._delivery.timeout_s, "the body did not arrive"):
            body = await read_body(http, ReceiverBody, _MAX_RECEIVER_BODY_NBYTES, lambda nbytes: None)
        _req_id.set(body.req_id)
        set_request_id(body.req_id)
        self._loaded()
        part = self._parts.get(body.req_id)
        try:
            endpoint = await self._delivery.allowed.endpoint(*split_receive_url(body.receive_url))
        except BadRequest as error:
            part.refuse(error)
            raise
        part.add(endpoint, body.receive_count)
        if part.error_frames is not None:  # its /encode came first, and has failed
            if part.is_complete:
                self._parts.discard(body.req_id)
            await self._delivery.push.push(endpoint, part.error_frames)
        return web.json_response(None)

    async def _encode(self, http: web.Request) -> web.Response:
        outcome = "cancelled"
        try:
            with self._calls.track(), self._budget.item() as reserved:
                await self._serve(http, reserved.reserve)
            outcome = "ok"
            return web.json_response(None)
        except Exception as error:
            outcome = error.code if isinstance(error, VitrineError) else InternalError.code
            raise
        finally:
            with harmless("a metric of requests"):
                self._metrics.requests.labels(outcome).inc()
                self._metrics.sglang_parts.labels(outcome).inc()

    async def _serve(self, http: web.Request, reserve: Reserve) -> None:
        """Reads, encodes and delivers a part; once its receivers are known, they are sent its error, too."""
        self._loaded()
        deadline = time.monotonic() + self._delivery.timeout_s
        async with self._until(deadline, "the body did not arrive"):
            body = await read_body(http, EncodeBody, _MAX_BODY_NBYTES, reserve)
        _req_id.set(body.req_id)
        set_request_id(body.req_id)
        report(model=self._model, items=len(body.mm_items))
        if body.part_idx >= body.num_parts:
            raise BadRequest(f"part_idx is {body.part_idx} of {body.num_parts} parts: the first one is 0")
        part_id = PartId(body.req_id, body.num_parts, body.part_idx, body.modality)
        direct = await self._direct_receivers(body)
        with self._parts.in_work(body.req_id) as part:
            try:
                part.check()
                async with self._until(deadline, "the items were not encoded"):
                    frames = await self._encoded(body, part_id, deadline, reserve)
                receivers = direct or await part.receivers(deadline)
            except Exception as error:
                error = as_vitrine_error(error)
                await self._deliver_error(part, direct, error_message(self._delivery.receiver, part_id, error))
                raise error
            async with self._until(deadline, "the receivers did not read the rows"):
                await self._push(receivers, frames)
        with harmless("a metric of rows"):
            self._metrics.sglang_bytes.inc(len(frames[1]) * len(receivers))

    async def _direct_receivers(self, body: EncodeBody) -> list[str]:
        """Returns the receivers that /encode names itself; none where they register."""
        if body.embedding_port is None:
            return []
        if body.prefill_host is None:
            raise BadRequest("embedding_port without prefill_host: give the host of the receiver")
        ports = [body.embedding_port] if isinstance(body.embedding_port, int) else body.embedding_port
        return [await self._delivery.allowed.endpoint(body.prefill_host, port) for port in ports]

    async def _encoded(self, body: EncodeBody, part: PartId, deadline: float, reserve: Reserve) -> list[Frame]:
        encoder, loader = self._loaded()
        items = await media_items(body, loader, reserve)
        encoded = await encoder.encode(items, body.req_id, deadline, reserve)
        return rows_message(self._delivery.receiver, part, encoded.layouts, encoded.rows_TW)

    async def _deliver_error(self, part: Part, direct: Sequence[str], frames: list[Frame]) -> None:
        """Sends an error to all receivers so far; those that register later are sent it then."""
        if not direct:
            part.error_frames = frames
        try:
            await self._push(direct or sorted(part.endpoints), frames)
        except VitrineError as error:
            _log.info("an error was not delivered: %s", error)

    async def _push(self, endpoints: Sequence[str], frames: Sequence[Frame]) -> None:
        """Sends a message to every endpoint, to all at once.

        Raises:
            TransportUnavailable: some receiver accepts no connection; the others are sent it nevertheless.
        """
        results = await asyncio.gather(
            *(self._delivery.push.push(endpoint, frames) for endpoint in endpoints), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    @asynccontextmanager
    async def _until(self, deadline: float, what: str) -> AsyncIterator[None]:
        """
        Raises:
            EncoderUnavailable: what is inside has not ended by the deadline.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                yield
        except TimeoutError:
            raise EncoderUnavailable(f"{what} within {self._delivery.timeout_s:g} s (--sglang-timeout-s)") from None

    def _loaded(self) -> tuple[PartEncoder, MediaLoader]:
        if self._encoder is None or self._loader is None:
            raise EncoderUnavailable("the encoder is still loading its model: try again when /health answers 200")
        return self._encoder, self._loader


async def _refuse_mooncake(http: web.Request) -> web.Response:
    raise BadRequest("this encoder sends rows by ZMQ only: give SGLang --encoder-transfer-backend zmq_to_scheduler")


@web.middleware
async def _errors_as_sglang(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answers every error of a handler, aiohttp's own included, as SGLang's encoders do."""
    # A connection's requests have one task.
    _req_id.set(None)
    set_request_id("")
    try:
        return await handler(request)
    except web.HTTPException as error:
        status, message = error.status, f"{request.method} {request.path}: {error.reason}"
    except Exception as error:
        error = as_vitrine_error(error)
        status, message = http_status(error), str(error)
        report(outcome=error.code)
    _log.info("%s: status %d: %s", request.path, status, message)
    return web.json_response({"status": "error", "message": message, "req_id": _req_id.get()}, status=status)
