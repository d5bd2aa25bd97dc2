"""Tool calls of an answer in the form of chat completions: in the message, or as deltas of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from vitrine_vlm.llm_worker.frontend.tool_calls import OfferedTools
from vitrine_vlm.llm_worker.frontend.tool_stream import Arguments, CallBegun, Content, Piece, ToolCallParser


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def choice_with_calls(text: str, finish_reason: str, tools: OfferedTools) -> dict[str, Any]:
    """Returns `message` and `finish_reason` of a whole answer."""
    parser = ToolCallParser(tools.names, streams_arguments=False)
    pieces = [*parser.push(text), *parser.finish()]
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, CallBegun):
            calls.append({"name": piece.name, "arguments": ""})
        elif isinstance(piece, Arguments):
            calls[-1]["arguments"] += piece.text
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if calls and tools.legacy:
        message["function_call"] = calls[0]
    elif calls:
        message["tool_calls"] = [{"id": new_call_id(), "type": "function", "function": call} for call in calls]
    return {
        "message": message | {"refusal": None},
        "finish_reason": _finish_reason(finish_reason, bool(calls), tools.legacy),
    }


def _finish_reason(reason: str, has_calls: bool, legacy: bool) -> str:
    if not has_calls or reason != "stop":
        return reason
    return "function_call" if legacy else "tool_calls"


class CallDeltas:
    """The deltas of one streamed answer."""

    def __init__(self, tools: OfferedTools) -> None:
        self._legacy = tools.legacy
        self._parser = ToolCallParser(tools.names, streams_arguments=True)

    def finish_reason(self, reason: str) -> str:
        """Returns how the answer ended, from how its generation did."""
        return _finish_reason(reason, self._parser.num_calls > 0, self._legacy)

    def push(self, text: str) -> list[dict[str, Any]]:
        """Returns a delta for each piece that is certain by now."""
        return self._deltas(self._parser.push(text))

    def finish(self) -> list[dict[str, Any]]:
        """Returns the deltas of the rest, when no more text comes."""
        return self._deltas(self._parser.finish())

    def _deltas(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        # The older form has room for one call.
        return [
            self._delta(piece) for piece in pieces if isinstance(piece, Content) or not (self._legacy and piece.index)
        ]

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Content):
            return {"content": piece.text}
        if isinstance(piece, Arguments):
            call: dict[str, Any] = {"function": {"arguments": piece.text}}
        else:
            call = {"id": new_call_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}}
        if self._legacy:
            return {"function_call": call["function"]}
        return {"tool_calls": [{"index": piece.index, **call}]}
