"""One trace goes through both services, and the collector gets its spans."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.fleet import ServiceProcess
from tests.integration.media import picture
from vitrine_vlm import __version__

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_ID = "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that come, by the service that sends them, and the versions of these."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.versions: set[str] = set()

    def Export(self, request, context):  # type: ignore[no-untyped-def]
        for resource in request.resource_spans:
            attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.versions.add(attributes["service.version"])
            service = attributes["service.name"]
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None)


async def test_a_callers_trace_goes_through_worker_and_encoder(
    qwen3_vl_folder: Path, tmp_path: Path, collector: tuple[Collector, str]
) -> None:
    shared = ["--model", str(qwen3_vl_folder), "--shm-folder", str(tmp_path), "--otlp-endpoint", collector[1]]
    shared += ["--log-format", "json"]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *shared, "--port", "0")
    worker = None
    try:
        address = (await asyncio.to_thread(encoder.wait_serving))["grpc"]
        worker = ServiceProcess(
            "vitrine_vlm.llm_worker", *shared, "--encoders", address, "--port", "0", "--grpc-port", "0"
        )
        http = (await asyncio.to_thread(worker.wait_serving))["http"]
        url = f"data:image/png;base64,{base64.b64encode(picture(1, 96, 64).data).decode()}"
        bad = "data:image/png;base64,AAAA"
        async with aiohttp.ClientSession(headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"}) as session:
            for image, status in ((url, 200), (bad, 400)):
                part = {"type": "image_url", "image_url": {"url": image}}
                body = {"model": qwen3_vl_folder.name, "messages": [{"role": "user", "content": [part]}]}
                async with session.post(f"http://{http}/v1/chat/completions", json=body | {"max_tokens": 4}) as answer:
                    assert answer.status == status
    finally:
        for process in (worker, encoder):  # which send their last spans before they end
            assert process is None or process.stop() == 0
    spans = [(service, span) for service, span in collector[0].spans if span.trace_id.hex() == TRACE_ID]
    assert collector[0].versions == {__version__}
    roots = [span for _, span in spans if span.parent_span_id.hex() == CALLER_ID]
    assert [span.name for span in roots] == ["POST /v1/chat/completions"] * 2
    encodes = [span for service, span in spans if (service, span.name) == ("vitrine-encoder", "encode")]
    assert [span.parent_span_id for span in encodes] == [span.span_id for span in roots]
    parts = {span.name: span for _, span in spans if span.parent_span_id == encodes[0].span_id}
    assert parts.keys() == {"load", "open", "preprocess", "queue", "forward", "ship"}
    own = {span.name: span for service, span in spans if service == "vitrine-llm" and span not in roots}
    assert own.keys() == {"land", "prefill", "decode"}
    # In the order in which it happened, on one clock; text in front of the picture is prefilled while it is encoded.
    order = [parts[name] for name in ("load", "open", "preprocess", "queue", "forward", "ship")] + [own["decode"]]
    starts = [span.start_time_unix_nano for span in order]
    assert starts == sorted(starts)
    assert own["prefill"].end_time_unix_nano == pytest.approx(own["decode"].start_time_unix_nano, abs=1e6)
    root = next(span for span in roots if span.span_id == encodes[0].parent_span_id)
    assert root.start_time_unix_nano <= starts[0] and order[-1].end_time_unix_nano <= root.end_time_unix_nano
    failed = [line for line in _logged(encoder) if "not_an_image" in line["message"]]
    assert len(failed) == 1 and failed[0]["request_id"].startswith("chatcmpl-")
    _check_access_lines(_logged(worker), _logged(encoder), address)
    values = {each.key: each.value for each in root.attributes}
    assert (values["vitrine.status"].int_value, values["vitrine.completion_tokens"].int_value) == (200, 4)
    assert [each.string_value for each in values["vitrine.encoder"].array_value.values] == [address]


def _logged(process: ServiceProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.lines if line.startswith("{")]


def _check_access_lines(worker: list[dict[str, Any]], encoder: list[dict[str, Any]], address: str) -> None:
    answered, refused = (line for line in worker if "status" in line)
    assert answered["message"].startswith("POST /v1/chat/completions: 200 in ")
    assert answered["request_id"].startswith("chatcmpl-")
    wanted = {"status": 200, "outcome": "ok", "encoder": [address], "completion_tokens": 4}
    assert wanted.items() <= answered.items()
    assert answered["prompt_tokens"] > answered["media_tokens"] > 0
    assert min(answered[stage] for stage in ("ttft_ms", "encode_ms", "prefill_ms", "decode_ms", "elapsed_ms")) > 0
    assert (refused["status"], refused["outcome"]) == (400, "not_an_image")
    encoded, failed = (line for line in encoder if "status" in line)
    assert encoded["request_id"] == answered["request_id"]
    assert (encoded["status"], encoded["items"], encoded["tokens"]) == ("OK", 1, answered["media_tokens"])
    assert encoded["model"] == answered["model"]
    assert min(encoded[stage] for stage in ("load_ms", "preprocess_ms", "forward_ms")) > 0
    # The worker reads no further once an item has failed.
    assert failed["status"] in ("OK", "CANCELLED") and failed["failed_items"] == 1
