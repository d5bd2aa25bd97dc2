"""How a stream of vLLM's that fails is distinguished from one that answers, however its bytes come."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vitrine_vlm.gateway.first_events import read_first_events

ERROR = {"error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}}
REFUSED = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}


ROLE = chunk(role="assistant", content="", reasoning=None)


def stream(*events: Any, end: str = "\n\n") -> bytes:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {line}{end}" for line in lines).encode()


@pytest.mark.parametrize("nbytes", [7, 50, 10_000])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (stream(ERROR, "[DONE]"), True),
        (stream(ROLE, ERROR, "[DONE]"), True),
        (stream(ROLE, ROLE, ERROR, end="\r\n\r\n"), True),
        (stream(ROLE, chunk(content="a"), ERROR), False),
        (stream(ROLE, chunk(tool_calls=[{"index": 0}]), ERROR), False),
        (stream(ROLE, chunk("stop"), ERROR), False),
        (stream(ROLE, REFUSED), False),
        (stream(ROLE), False),
        (stream("[DONE]"), False),
        (stream("{", ERROR), False),
        (stream({"choices": []}, ERROR), False),
        (stream([1], ERROR), False),
        (b"", False),
        (b"x" * 200_000, False),
    ],
)
async def test_the_first_events_decide(data: bytes, expected: bool, nbytes: int) -> None:
    pieces = iter([data[at : at + nbytes] for at in range(0, len(data), nbytes)])

    async def read() -> bytes:
        return next(pieces, b"")

    found, is_error = await read_first_events(read)
    assert (found + b"".join(pieces), is_error) == (data, expected)
