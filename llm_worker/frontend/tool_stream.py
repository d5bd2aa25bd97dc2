"""Finds tool calls in an answer's text, in the form of Hermes, while the text arrives in pieces:

    <tool_call>
    {"name": "crop", "arguments": {"x": 1}}
    </tool_call>

White space around calls is part of the markup. What only looks like a call (broken JSON, a name that is not among the
tools) is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from vitrine_vlm.llm_worker.frontend.json_object_scanner import JsonObjectScanner

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Up to the brace of the arguments.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallBegun:
    """index: of the answer's calls, from 0 on."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of a call's arguments, byte for byte as the model has written them."""

    index: int
    text: str


Piece: TypeAlias = Content | CallBegun | Arguments


class ToolCallParser:
    """Splits an answer's text into content and calls. The pieces, joined, do not depend on how the text is cut.

    num_calls: that have begun.

    Args:
        names: of the tools that may be called.
        streams_arguments: passes arguments on as they come, from the call's name on. What then turns out to be broken
            JSON cannot be taken back: it is arguments, up to the end of the call.
    """

    def __init__(self, names: Collection[str], streams_arguments: bool) -> None:
        self.num_calls = 0
        self._names = names
        self._streams_arguments = streams_arguments
        self._held = ""
        # White space in front of a call that may turn out to be content.
        self._gap = ""
        self._scanner = JsonObjectScanner()
        self._at_end = False
        self._is_behind_call = False
        self._pieces: list[Piece] = []
        # Each reads what it can from the held text, and returns whether another goes on with the rest.
        self._read: Callable[[], bool] = self._read_content

    def push(self, text: str) -> list[Piece]:
        """Returns what is certain by now."""
        self._held += text
        while self._read():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """Returns the rest, when no more text comes."""
        self._at_end = True
        return self.push("")

    def _read_content(self) -> bool:
        start = self._held.find(OPEN)
        if start >= 0:
            before, self._held = self._held[:start], self._held[start:]
            text = before.rstrip()
            self._gap = before[len(text) :]
            self._add_content(text)
            self._scanner = JsonObjectScanner()
            self._read = self._read_call
            return True
        if self._at_end:
            self._add_content("" if self._is_behind_call and not self._held.strip() else self._held)
            self._held = ""
            return False
        certain = self._held[: len(self._held) - _beginning_of(OPEN, self._held)].rstrip()
        self._held = self._held[len(certain) :]
        self._add_content(certain)
        return False

    def _read_call(self) -> bool:
        """Reads from OPEN on, all of which is held until it is known to be a call."""
        body = self._held[len(OPEN) :]
        start = len(body) - len(body.lstrip())
        if start == len(body):
            return self._not_a_call() if self._at_end else False
        if body[start] != "{":
            return self._not_a_call()
        if self._streams_arguments and (head := _HEAD.match(body)):
            if head[1] not in self._names:
                return self._not_a_call()
            self._begin_call(head[1])
            self._held = body[head.end() :]
            self._scanner = JsonObjectScanner()
            self._read = self._read_arguments
            return True
        self._scanner.feed(body[start + self._scanner.length :])
        if not self._scanner.is_complete:
            return self._not_a_call() if self._scanner.is_broken or self._at_end else False
        end = start + self._scanner.length
        behind = body[end:].lstrip()
        if not behind.startswith(CLOSE) and not (CLOSE.startswith(behind) and self._at_end):
            return False if CLOSE.startswith(behind) else self._not_a_call()
        call = _call_of(body[start:end])
        if call is None or call[0] not in self._names:
            return self._not_a_call()
        self._begin_call(call[0])
        self._pieces.append(Arguments(self.num_calls - 1, call[1]))
        return self._end_call(behind[len(CLOSE) :])

    def _read_arguments(self) -> bool:
        self._add_arguments(self._scanner.feed(self._held))
        if self._scanner.is_broken:
            self._read = self._read_broken_arguments
        elif self._scanner.is_complete:
            self._read = self._read_end
        return self._scanner.is_broken or self._scanner.is_complete

    def _read_broken_arguments(self) -> bool:
        end = self._held.find(CLOSE)
        if end < 0:
            self._add_arguments(len(self._held) - (0 if self._at_end else _beginning_of(CLOSE, self._held)))
            return False
        self._add_arguments(end)
        self._read = self._read_end
        return True

    def _read_end(self) -> bool:
        """Reads from behind the arguments to behind CLOSE."""
        end = self._held.find(CLOSE)
        if end < 0:
            self._held = self._held[len(self._held) - _beginning_of(CLOSE, self._held) :]
            return False
        return self._end_call(self._held[end + len(CLOSE) :])

    def _not_a_call(self) -> bool:
        """Lets the opening be content; what follows it may have another call."""
        self._add_content(self._gap + OPEN)
        self._held = self._held[len(OPEN) :]
        self._read = self._read_content
        return True

    def _begin_call(self, name: str) -> None:
        self._pieces.append(CallBegun(self.num_calls, name))
        self.num_calls += 1

    def _end_call(self, behind: str) -> bool:
        self._held = behind
        self._is_behind_call = True
        self._read = self._read_content
        return True

    def _add_content(self, text: str) -> None:
        if text:
            self._is_behind_call = False
            self._pieces.append(Content(text))

    def _add_arguments(self, length: int) -> None:
        if length:
            self._pieces.append(Arguments(self.num_calls - 1, self._held[:length]))
            self._held = self._held[length:]


def _beginning_of(tag: str, text: str) -> int:
    """Returns the length of the longest end of the text that the tag begins with."""
    return next((length for length in range(min(len(tag), len(text)), 0, -1) if tag.startswith(text[-length:])), 0)


def _call_of(text: str) -> tuple[str, str] | None:
    """Returns name and arguments of a call's JSON object; None where it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    if head := _HEAD.match(text):
        written = text[head.end() :]
        return name, written[: JsonObjectScanner().feed(written)]
    # Escapes stay where there are some: half a surrogate pair cannot be sent in another form.
    return name, json.dumps(arguments, ensure_ascii="\\u" in text)
