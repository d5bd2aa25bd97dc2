"""The Prefill service: a thin servicer over Generator and RowExporter."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import grpc

from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter
from vitrine_vlm.embedding_transport.shipping.session_rpc import SessionServicer
from vitrine_vlm.embedding_transport.wire.grpc_status import abort, logged_call, send
from vitrine_vlm.embedding_transport.wire.messages import layout_to_proto
from vitrine_vlm.errors import BadRequest, PrefillUnavailable, WorkerUnavailable
from vitrine_vlm.llm_worker.generation.events import FirstToken, GenerationRequest, Started
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat, check_format
from vitrine_vlm.llm_worker.prefill.wire import format_from_proto, format_to_proto, prefilled_to_proto
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.llm_worker.wire import checked_salt, generation_from_proto
from vitrine_vlm.protos.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from vitrine_vlm.service_runtime.access_log import report
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.tenants import CacheScope, current_tenant
from vitrine_vlm.service_runtime.traces import metadata_carrier, serving_span
from vitrine_vlm.types import ItemTimings

PrefillContext: TypeAlias = grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse | bytes]


@dataclass(frozen=True)
class ServedPrefill:
    """What the servicer uses, once the model is loaded. kv_format: of the KV that `exporter` sends."""

    served: ServedModel
    kv_format: KvFormat
    exporter: RowExporter


class PrefillServicer(SessionServicer, prefill_pb2_grpc.PrefillServicer):  # type: ignore[misc]
    """Answers UNAVAILABLE until `open` is called.

    Args:
        held: the process's budget, of which KV that is sent as bytes is a part.
    """

    def __init__(self, requests: RequestTracker, held: ByteBudget) -> None:
        self._requests = requests
        self._held = held
        self._prefilling: ServedPrefill | None = None

    def open(self, prefilling: ServedPrefill) -> None:
        self._prefilling = prefilling

    async def Describe(
        self,
        request: prefill_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[prefill_pb2.DescribeRequest, prefill_pb2.KvFormat],
    ) -> prefill_pb2.KvFormat:
        try:
            return format_to_proto(self._loaded().kv_format)
        except Exception as error:
            await abort(context, error)

    # A coroutine that writes instead of a generator, for the reason given at SessionServicer.
    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: PrefillContext) -> None:  # type: ignore[override]
        try:
            with serving_span("prefill", metadata_carrier(context.invocation_metadata())), logged_call("Prefill"):
                prefilling = self._loaded()
                report(model=prefilling.served.name)
                check_format("the decode worker", format_from_proto(request.format), prefilling.kv_format)
                generation = generation_from_proto(
                    request.request_id, request.prompt, request.sampling, prefilling.served.defaults, _scope(request)
                )
                await self._prefill(generation, request, prefilling, context)
        except WorkerUnavailable as error:  # clients know this worker as a prefill worker
            await abort(context, PrefillUnavailable(str(error)))
        except Exception as error:
            await abort(context, error)

    async def _prefill(
        self,
        generation: GenerationRequest,
        request: prefill_pb2.PrefillRequest,
        prefilling: ServedPrefill,
        context: PrefillContext,
    ) -> None:
        known: Started | None = None
        leases: list[int] = []
        exporter, session_id, first_row = prefilling.exporter, request.session_id, request.first_row
        reserved = self._held.item()
        try:
            async with self._requests.track(partial(prefilling.served.generator.prefill, generation)) as events:
                async for event in events:
                    if isinstance(event, Started):
                        known = event
                        if first_row >= known.num_prompt_tokens:
                            raise BadRequest(
                                f"first_row {first_row} must be below the prompt's {known.num_prompt_tokens} tokens"
                            )
                        for index, layout in enumerate(event.layouts):
                            await send(context, prefill_pb2.PrefillResponse(layout=layout_to_proto(index, layout)))
                    elif isinstance(event, FirstToken):
                        assert known is not None
                        await send(context, prefill_pb2.PrefillResponse(prefilled=prefilled_to_proto(known, event)))
                        if generation.sampling.is_last(event.token_ids[0]):
                            continue
                        kv = event.kv.from_row(first_row)
                        if exporter.sends_bytes(session_id, kv.nbytes):
                            reserved.reserve(kv.nbytes)
                        exported = exporter.export(session_id, 0, kv, ItemTimings(), call_id=request.call_id)
                        async with aclosing(exported) as responses:
                            async for response in responses:
                                if isinstance(response, bytes):
                                    await send(context, response)
                                else:
                                    leases.append(response.ready.lease.lease_id)
                                    await send(context, prefill_pb2.PrefillResponse(ready=response.ready))
        except BaseException:
            # A lease may have been sent to a client that does not read it any more.
            exporter.release(session_id, leases)
            raise
        finally:
            reserved.release()

    def _exporter(self) -> RowExporter:
        return self._loaded().exporter

    def _loaded(self) -> ServedPrefill:
        if self._prefilling is None:
            raise PrefillUnavailable("the worker is still loading its model: try again when it is SERVING")
        return self._prefilling


def _scope(request: prefill_pb2.PrefillRequest) -> CacheScope:
    """The scope of the request that the decode worker serves.

    Raises:
        BadRequest: the caller's own tenant is another one.
    """
    own = current_tenant()
    if own and request.tenant != own:
        raise BadRequest(
            f"the tenant {request.tenant!r} of this prompt is not the caller's, {own!r}: send no other", "tenant"
        )
    return CacheScope(request.tenant, checked_salt(request.cache_salt))
