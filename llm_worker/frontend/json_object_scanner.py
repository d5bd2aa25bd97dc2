"""Finds the end of a JSON object in text that arrives in pieces."""

from __future__ import annotations

import re

# What changes the state outside of strings, and inside of them, with what cannot stand there.
_OUTSIDE = re.compile(r'[{}\[\]"<]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')
_OPENING = {"}": "{", "]": "["}


class JsonObjectScanner:
    """Reads from an object's brace on. It knows brackets and strings, and leaves the rest of JSON to a parser.

    length: of what has been read of the object.
    is_complete: its last brace has been read.
    is_broken: it is none: brackets do not match, a string has a line break, or a tag stands outside of strings.
    """

    def __init__(self) -> None:
        self.length = 0
        self.is_complete = False
        self.is_broken = False
        self._open: list[str] = []
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> int:
        """Reads the next piece; returns how much of it belongs to the object, up to its end or to what breaks it."""
        position = 0
        while position < len(text) and not (self.is_complete or self.is_broken):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            found = (_INSIDE if self._in_string else _OUTSIDE).search(text, position)
            if found is None:
                position = len(text)
                continue
            self._read(found[0])
            position = found.start() if self.is_broken else found.end()
        self.length += position
        return position

    def _read(self, character: str) -> None:
        if character == '"':
            self._in_string = not self._in_string
        elif self._in_string:
            self._is_escaped = character == "\\"
            self.is_broken = not self._is_escaped
        elif character in "{[":
            self._open.append(character)
        elif character in _OPENING and self._open and self._open.pop() == _OPENING[character]:
            self.is_complete = not self._open
        else:
            self.is_broken = True
