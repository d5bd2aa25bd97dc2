"""Without a collector nothing is recorded, but a caller's trace is propagated to called services."""

from __future__ import annotations

from opentelemetry import trace

from vitrine_vlm.service_runtime.traces import outgoing_metadata, serving_span, span

CALLER = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "other": "header"}


def test_an_untraced_service_passes_the_callers_trace_on() -> None:
    with serving_span("encode", CALLER), span("load"):
        assert outgoing_metadata() == [("traceparent", CALLER["traceparent"])]
    assert outgoing_metadata() == []


def test_an_untraced_request_stays_untraced() -> None:
    with serving_span("encode", {"other": "header"}), span("load"):
        assert outgoing_metadata() == []
        assert not trace.get_current_span().get_span_context().is_valid
