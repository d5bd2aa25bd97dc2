"""API keys at both doors, without Ray: the HTTP door before a worker of the test, the gRPC door before an encoder."""

# The encoder here has no method but Encode.
# mypy: disable-error-code="abstract"

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

import grpc
from starlette.requests import Request

from tests.deploy.ray_serve.choosing import Replicas
from tests.deploy.ray_serve.test_encode_forwarder import Encoder
from tests.deploy.ray_serve.test_encode_forwarder import request as encode_request
from tests.deploy.ray_serve.test_encode_forwarder import serving as serving_encoders
from tests.deploy.ray_serve.test_http_forwarder import Worker, serving
from tests.service_runtime.test_api_keys import ALICE, BOB, bearer, entry
from vitrine_vlm.deploy.ray_serve.config import ServeArguments
from vitrine_vlm.deploy.ray_serve.gateway import Gateway
from vitrine_vlm.errors import Unauthenticated
from vitrine_vlm.protos.encoder.v1 import encoder_pb2


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [entry(ALICE, "alice", "a", requests_per_minute=2)]}))
    return str(file)


def context(metadata: dict[str, str]) -> Any:
    """Of one gRPC call, as far as the gateway uses it. codes: those that were set."""
    codes: list[grpc.StatusCode] = []
    pairs = list(metadata.items())
    return SimpleNamespace(
        codes=codes, set_code=codes.append, set_details=lambda details: None, invocation_metadata=lambda: pairs
    )


async def ask(gateway: Gateway, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer. The body cannot be read."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": raw}
    response = await gateway(Request(scope, receive))
    await response(scope, receive, send)
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def closed(gateway: Gateway) -> None:
    """As Ray Serve does it; the interpreter, which calls `__del__` as well, then gets nothing that it had to await."""
    closing = gateway.__del__()
    assert closing is not None
    await closing
    assert gateway.__del__() is None


async def test_the_http_door(keys_file: str) -> None:
    worker = Worker()
    async with serving(worker) as addresses:
        gateway = Gateway(Replicas([]), Replicas(addresses), 4, 1.0, keys_file)  # type: ignore[arg-type]
        for headers in ({}, bearer(BOB)):
            status, answered = await ask(gateway, headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
        assert not worker.asked
        assert [(await ask(gateway, bearer(ALICE)))[0] for _ in range(2)] == [200, 200]
        assert worker.asked[0][3]["Authorization"] == f"Bearer {ALICE}", "the worker checks the media of the key"
        status, answered = await ask(gateway, bearer(ALICE))
        assert (status, answered["retry-after"]) == (429, "30")
        gateway.check_health()
        await closed(gateway)


async def test_the_grpc_door(keys_file: str) -> None:
    encoder = Encoder()
    request = encode_request(b"x")
    request.tenant = "b"
    async with serving_encoders(encoder) as addresses:
        gateway = Gateway(Replicas(addresses), Replicas([]), 4, 1.0, keys_file)  # type: ignore[arg-type]
        stranger = context({})
        with pytest.raises(Unauthenticated):
            await gateway.Describe(encoder_pb2.DescribeRequest(), stranger)
        assert stranger.codes == [grpc.StatusCode.UNAUTHENTICATED]
        with pytest.raises(Unauthenticated):
            async for _ in gateway.Encode(request, context(bearer(BOB))):
                raise AssertionError
        assert [each async for each in gateway.Encode(request, context(bearer(ALICE)))]
        assert encoder.tenant == "a"
        await closed(gateway)


def test_keys_are_no_arguments_but_their_file_is(keys_file: str) -> None:
    with pytest.raises(ValueError, match="use api_keys_file"):
        ServeArguments.model_validate({"model": "m", "llm.settings.api_key": ALICE})
    found = ServeArguments.model_validate({"model": "m", "llm.settings.api_keys_file": keys_file})
    assert found.llm.environment("m")["VITRINE_LLM_API_KEYS_FILE"] == keys_file
