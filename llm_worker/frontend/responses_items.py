"""The output of a response: messages and function calls, one after another, and the events that they grow by."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from vitrine_vlm.llm_worker.frontend.chat_tool_calls import new_call_id
from vitrine_vlm.llm_worker.frontend.openai_answers import TokenTexts
from vitrine_vlm.llm_worker.frontend.tool_calls import OfferedTools
from vitrine_vlm.llm_worker.frontend.tool_stream import CallBegun, Content, Piece, ToolCallParser
from vitrine_vlm.llm_worker.generation.events import Delta

# An event as it is sent, but for its number.
Event = dict[str, Any]


@dataclass
class _Message:
    """place: of the item in the output, and of its one text."""

    id: str
    place: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": [self._part()]}

    def begun(self) -> Iterator[Event]:
        item = self.item("in_progress") | {"content": []}
        yield {"type": "response.output_item.added", "output_index": self.place["output_index"], "item": item}
        yield {"type": "response.content_part.added", "item_id": self.id, "part": self._part(), **self.place}

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        self.texts.append(text)
        self.logprobs += logprobs
        kind = "response.output_text.delta"
        return {"type": kind, "item_id": self.id, "delta": text, "logprobs": logprobs, **self.place}

    def ended(self) -> Iterator[Event]:
        part = self._part()
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield {"type": "response.output_text.done", "item_id": self.id, **text, **self.place}
        yield {"type": "response.content_part.done", "item_id": self.id, "part": part, **self.place}

    def _part(self) -> dict[str, Any]:
        text = {"text": "".join(self.texts), "annotations": [], "logprobs": list(self.logprobs)}
        return {"type": "output_text", **text}


@dataclass
class _Call:
    """place: of the item in the output."""

    id: str
    place: dict[str, Any]
    name: str
    call_id: str = field(default_factory=new_call_id)
    arguments: list[str] = field(default_factory=list)

    def item(self, status: str) -> dict[str, Any]:
        call = {"call_id": self.call_id, "name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function_call", "status": status, **call}

    def begun(self) -> Iterator[Event]:
        yield {"type": "response.output_item.added", "item": self.item("in_progress"), **self.place}

    def add(self, arguments: str) -> Event:
        self.arguments.append(arguments)
        kind = "response.function_call_arguments.delta"
        return {"type": kind, "item_id": self.id, "delta": arguments, **self.place}

    def ended(self) -> Iterator[Event]:
        kind = "response.function_call_arguments.done"
        call = {"name": self.name, "arguments": "".join(self.arguments)}
        yield {"type": kind, "item_id": self.id, **call, **self.place}


class OutputItems:
    """The items of one response.

    Args:
        tools: that the answer may call.
        streams: whether the events are sent.
    """

    def __init__(self, request_id: str, texts: TokenTexts, tools: OfferedTools | None, streams: bool) -> None:
        self._request_id = request_id
        self._texts = texts
        self._parser = ToolCallParser(tools.names, streams) if tools is not None else None
        self._items: list[_Message | _Call] = []
        # Of tokens whose text is held back; those of a call's markup have no place.
        self._logprobs: list[dict[str, Any]] = []

    def output(self, status: str) -> list[dict[str, Any]]:
        """All items; the last one has the status of the response."""
        *others, last = self._items
        return [*(each.item("completed") for each in others), last.item(status)]

    def begin(self) -> Iterator[Event]:
        """Without tools the answer is a message."""
        if self._parser is None:
            yield from self._begin_message()

    def push(self, delta: Delta) -> Iterator[Event]:
        self._logprobs += [self._texts.logprob(each) for each in delta.logprobs]
        for piece in self._parser.push(delta.text) if self._parser is not None else [Content(delta.text)]:
            yield from self._add(piece)

    def finish(self, status: str) -> Iterator[Event]:
        """Ends the last item with the status of the response."""
        for piece in self._parser.finish() if self._parser is not None else []:
            yield from self._add(piece)
        if not self._items:
            yield from self._begin_message()
        yield from self._end_last(status)

    def _add(self, piece: Piece) -> Iterator[Event]:
        last = self._items[-1] if self._items else None
        if isinstance(piece, Content):
            if not isinstance(last, _Message):
                yield from self._end_last("completed")
                last = yield from self._begin_message()
            logprobs, self._logprobs = self._logprobs, []
            yield last.add(piece.text, logprobs)
        elif isinstance(piece, CallBegun):
            yield from self._end_last("completed")
            self._logprobs = []
            call = _Call(f"fc_{self._request_id}_{piece.index}", {"output_index": len(self._items)}, piece.name)
            self._items.append(call)
            yield from call.begun()
        else:
            assert isinstance(last, _Call)
            self._logprobs = []
            yield last.add(piece.text)

    def _begin_message(self) -> Generator[Event, None, _Message]:
        index = len(self._items)
        name = f"msg_{self._request_id}" + (f"_{index}" if index else "")
        message = _Message(name, {"output_index": index, "content_index": 0})
        self._items.append(message)
        yield from message.begun()
        return message

    def _end_last(self, status: str) -> Iterator[Event]:
        if self._items:
            yield from self._items[-1].ended()
            item = self._items[-1].item(status)
            yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item}
