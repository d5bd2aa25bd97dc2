"""Whether a stream of vLLM's failed before its first token: its status is 200 then, and its error an event.

Source: vLLM 0.32, vllm/entrypoints/openai/chat_completion/serving.py: an event for the role precedes the error.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

_MAX_NBYTES = 65536


async def read_first_events(read: Callable[[], Awaitable[bytes]]) -> tuple[bytes, bool]:
    """Reads a stream up to its first token, or up to its error.

    Returns the bytes that were read, and whether they hold an error of the server.

    Args:
        read: returns the next bytes; none at the end.
    """
    data = b""
    while len(data) < _MAX_NBYTES:
        more = await read()
        data += more
        events = data.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]
        for event in events:
            kind = _kind(event)
            if kind != "role":
                return data, kind == "error"
        if not more:
            break
    return data, False


def _kind(event: bytes) -> str:
    """Returns "role" for an event without anything of the answer yet, "error" for an error of the server."""
    try:
        fields = json.loads(event.removeprefix(b"data:"))
        if "error" in fields:
            return "error" if int(fields["error"]["code"]) >= 500 else "other"
        nothing_yet = all(
            choice["finish_reason"] is None
            and not any(value for name, value in choice["delta"].items() if name != "role")
            for choice in fields["choices"]
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "other"
    return "role" if nothing_yet and fields["choices"] else "other"
