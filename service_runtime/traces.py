"""Traces of requests across both services: OpenTelemetry spans, W3C trace context in HTTP headers and gRPC metadata."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import context, propagate, trace
from opentelemetry.util.types import AttributeValue

from vitrine_vlm import __version__

# None unless `start_tracing` has a collector: without one no spans are created.
_tracer: trace.Tracer | None = None
_NO_SPAN = nullcontext()
_TRACE_CONTEXT = "traceparent"


def start_tracing(service_name: str, otlp_endpoint: str) -> Callable[[], None]:
    """Sends the spans of this process to a collector. The returned function sends the last ones.

    Args:
        otlp_endpoint: http://host:port of its OTLP/gRPC receiver, or https. Empty for no traces at all.
    """
    global _tracer
    if not otlp_endpoint:
        return lambda: None
    # Imported here, because a client of the services needs only OpenTelemetry's API, to propagate a trace.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service_name, SERVICE_VERSION: __version__}))
    exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=not otlp_endpoint.startswith("https:"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    _tracer = trace.get_tracer("vitrine")
    return provider.shutdown


@contextmanager
def serving_span(name: str, carrier: Mapping[str, str], **attributes: AttributeValue) -> Iterator[None]:
    """The span of a request in this service. Spans inside, also of tasks started inside, are its children.

    Args:
        carrier: the headers or metadata of the request, with names in lower case.
    """
    if _tracer is not None:
        with _tracer.start_as_current_span(name, propagate.extract(dict(carrier)), trace.SpanKind.SERVER, attributes):
            yield
    elif _TRACE_CONTEXT in carrier:
        # This service is not traced, but a service that it calls may be.
        token = context.attach(propagate.extract(dict(carrier)))
        try:
            yield
        finally:
            context.detach(token)
    else:
        yield


def annotate_span(attributes: Mapping[str, AttributeValue]) -> None:
    """Adds attributes to the span of the current request, if there is one."""
    if _tracer is not None:
        trace.get_current_span().set_attributes(attributes)


def span(name: str, **attributes: AttributeValue) -> AbstractContextManager[None]:
    """The span of a part of the current request. Unlike `serving_span` it may be exited in another task."""
    return _NO_SPAN if _tracer is None else _part(_tracer, name, attributes)


def past_span(name: str, started_s_ago: float, duration_s: float, **attributes: AttributeValue) -> None:
    """Records the span of a part of the current request that has ended."""
    if _tracer is None:
        return
    start_ns = time.time_ns() - int(started_s_ago * 1e9)
    part = _tracer.start_span(name, attributes=attributes, start_time=start_ns)
    part.end(start_ns + int(duration_s * 1e9))


@contextmanager
def _part(tracer: trace.Tracer, name: str, attributes: Mapping[str, AttributeValue]) -> Iterator[None]:
    part = tracer.start_span(name, attributes=attributes)
    try:
        yield
    finally:
        part.end()


def outgoing_metadata() -> list[tuple[str, str]]:
    """Returns the metadata that propagates the current trace to the called service."""
    if not context.get_current():  # injecting nothing takes as long as a message of the protocol
        return []
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return list(carrier.items())


def metadata_carrier(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Returns a gRPC call's metadata as a carrier for `serving_span`."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
