"""Walks the outer levels of a JSON text, so that values in it can be replaced and all others stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_decode_at = json.JSONDecoder().raw_decode
_WHITESPACE = re.compile(r"[ \t\n\r]*")


class JsonScanner:
    """Reads one JSON text from its beginning to its end. All methods raise ValueError where it is not JSON.

    position: of the next character that is not read; behind white space after `peek`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def peek(self) -> str:
        """Skips white space; returns the character behind it, or "" at the end."""
        match = _WHITESPACE.match(self.text, self.position)
        assert match is not None
        self.position = match.end()
        return self.text[self.position : self.position + 1]

    def value(self) -> Any:
        """Reads and decodes the next value, whatever it holds.

        Raises:
            RecursionError: it is nested too deeply.
        """
        self.peek()
        value, self.position = _decode_at(self.text, self.position)
        return value

    def members(self) -> Iterator[str]:
        """Reads an object: yields each key. The caller must read the value that lies behind it then."""
        self._read("{")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            if self.peek() != '"':
                raise self._unexpected("a key")
            key: str = self.value()
            self._read(":")
            self.peek()
            yield key
            if self._read(",}") == "}":
                return

    def elements(self) -> Iterator[int]:
        """Reads an array: yields each index. The caller must read the value that lies there then."""
        self._read("[")
        if self.peek() == "]":
            self.position += 1
            return
        index = 0
        while True:
            self.peek()
            yield index
            if self._read(",]") == "]":
                return
            index += 1

    def end(self) -> None:
        """Checks that nothing is left."""
        if self.peek():
            raise self._unexpected("the end")

    def _read(self, expected: str) -> str:
        """Reads one of these characters."""
        found = self.peek()
        if not found or found not in expected:
            raise self._unexpected(" or ".join(expected))
        self.position += 1
        return found

    def _unexpected(self, expected: str) -> ValueError:
        return ValueError(f"character {self.position} should be {expected}")
