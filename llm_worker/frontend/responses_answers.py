"""Answers of `/v1/responses`: the response, whole, or the events that it grows by."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.frontend.openai_answers import TokenTexts
from vitrine_vlm.llm_worker.frontend.responses_items import Event, OutputItems
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.generation.events import Delta, Finished
from vitrine_vlm.service_runtime.http_errors import error_body

_TOOL_FIELDS = {"type", "name", "description", "parameters", "strict"}


@dataclass
class ResponseWriter:
    """Writes one response: whole, or as events, of all deltas in order and then of how the generation ended.

    sampling: what is in force, the request's or the checkpoint's.
    """

    request_id: str
    model: str
    request: ResponsesRequest
    sampling: SamplingParams
    texts: TokenTexts
    created_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._num_events = 0
        self._items = OutputItems(self.request_id, self.texts, self.request.offered_tools, self.request.stream)

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> dict[str, Any]:
        """The response to a request that does not stream."""
        events = [*self.first_events(), *chain.from_iterable(map(self.delta_events, deltas))]
        *_, last = chain(events, self.last_events(finished))
        response: dict[str, Any] = last["response"]
        return response

    def _response(self, finished: Finished | None) -> dict[str, Any]:
        """The response so far; None for one that goes on."""
        status = "in_progress" if finished is None else _status(finished)
        body = {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.request.instructions,
            "max_output_tokens": self.request.max_output_tokens,
            "metadata": self.request.metadata,
            "model": self.model,
            "output": [] if finished is None else self._items.output(status),
            "parallel_tool_calls": self.request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": self.sampling.temperature,
            "text": {"format": _format(self.request)},
            "tool_choice": _tool_choice(self.request),
            "tools": [tool.model_dump(include=_TOOL_FIELDS) for tool in self.request.tools],
            "top_logprobs": self.request.top_logprobs or 0,
            "top_p": self.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if finished is not None:
            body["usage"] = _usage(finished)
            body["timings"] = {name: round(value, 3) for name, value in vars(finished.timings).items()}
        return body

    def first_events(self) -> Iterator[Event]:
        """The events in front of the first text."""
        yield self._numbered({"type": "response.created", "response": self._response(None)})
        yield self._numbered({"type": "response.in_progress", "response": self._response(None)})
        yield from map(self._numbered, self._items.begin())

    def delta_events(self, delta: Delta) -> Iterator[Event]:
        yield from map(self._numbered, self._items.push(delta))

    def last_events(self, finished: Finished) -> Iterator[Event]:
        """The events behind the last text; the very last one has the whole response."""
        status = _status(finished)
        yield from map(self._numbered, self._items.finish(status))
        yield self._numbered({"type": f"response.{status}", "response": self._response(finished)})

    def error_event(self, error: VitrineError) -> Event:
        described = error_body(error)["error"]
        fields = {name: described[name] for name in ("code", "message", "param")}
        return self._numbered({"type": "error", **fields})

    def _numbered(self, event: Event) -> Event:
        number, self._num_events = self._num_events, self._num_events + 1
        return {**event, "sequence_number": number}


def _format(request: ResponsesRequest) -> dict[str, Any]:
    """The form of the text, as it was asked for."""
    given = request.text.format
    return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_unset=True)


def _tool_choice(request: ResponsesRequest) -> Any:
    """The request's choice, as responses have it."""
    choice = request.tool_choice
    if choice is None or not choice.names:
        return (choice.mode if choice is not None else "auto") if request.tools else "none"
    tools = [{"type": "function", "name": name} for name in choice.names]
    return tools[0] if choice.is_one else {"type": "allowed_tools", "mode": choice.mode, "tools": tools}


def _status(finished: Finished) -> str:
    return "incomplete" if finished.finish_reason == "length" else "completed"


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "input_tokens": finished.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": finished.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.num_prompt_tokens + finished.num_completion_tokens,
    }
