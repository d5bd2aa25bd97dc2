"""Answers of `/v1/responses`: the response, whole, or the events that it grows by."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.frontend.openai_answers import TokenTexts
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.generation.events import Delta, Finished
from vitrine_vlm.service_runtime.http_errors import error_body

Event = dict[str, Any]
# The place of the one text of an answer.
_PLACE = {"output_index": 0, "content_index": 0}


@dataclass
class ResponseWriter:
    """Writes one response. It is given all deltas in order, and then how the generation ended.

    sampling: what is in force, the request's or the checkpoint's.
    """

    request_id: str
    model: str
    request: ResponsesRequest
    sampling: SamplingParams
    texts: TokenTexts
    created_at: int = field(default_factory=lambda: int(time.time()))
    _num_events: int = field(default=0, init=False)
    _text: list[str] = field(default_factory=list, init=False)
    _logprobs: list[dict[str, Any]] = field(default_factory=list, init=False)

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """Keeps the delta; returns its log-probabilities."""
        logprobs = [self.texts.logprob(each) for each in delta.logprobs]
        self._text.append(delta.text)
        self._logprobs += logprobs
        return logprobs

    def response(self, finished: Finished | None) -> dict[str, Any]:
        """The response so far; None for one that goes on."""
        is_cut = finished is not None and finished.finish_reason == "length"
        status = "in_progress" if finished is None else "incomplete" if is_cut else "completed"
        body = {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": self.request.instructions,
            "max_output_tokens": self.request.max_output_tokens,
            "metadata": self.request.metadata,
            "model": self.model,
            "output": [] if finished is None else [self._message(status)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.sampling.temperature,
            "text": {"format": self._format()},
            "tool_choice": "none",
            "tools": [],
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
        yield self._event("response.created", response=self.response(None))
        yield self._event("response.in_progress", response=self.response(None))
        item = self._message("in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", item_id=item["id"], part=empty, **_PLACE)

    def delta_event(self, delta: Delta) -> Event:
        logprobs = self.add(delta)
        return self._event(
            "response.output_text.delta", item_id=self._item_id, delta=delta.text, logprobs=logprobs, **_PLACE
        )

    def last_events(self, finished: Finished) -> Iterator[Event]:
        """The events behind the last text."""
        response = self.response(finished)
        item = response["output"][0]
        part = item["content"][0]
        yield self._event(
            "response.output_text.done",
            item_id=item["id"],
            text=part["text"],
            logprobs=part["logprobs"],
            **_PLACE,
        )
        yield self._event("response.content_part.done", item_id=item["id"], part=part, **_PLACE)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def error_event(self, error: VitrineError) -> Event:
        described = error_body(error)["error"]
        return self._event("error", code=described["code"], message=described["message"], param=described["param"])

    @property
    def _item_id(self) -> str:
        return f"msg_{self.request_id}"

    def _format(self) -> dict[str, Any]:
        """The form of the text, as it was asked for."""
        given = self.request.text.format
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_unset=True)

    def _message(self, status: str) -> dict[str, Any]:
        text = {"type": "output_text", "text": "".join(self._text), "annotations": [], "logprobs": self._logprobs}
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": [text]}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number, **fields}


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "input_tokens": finished.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": finished.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.num_prompt_tokens + finished.num_completion_tokens,
    }
