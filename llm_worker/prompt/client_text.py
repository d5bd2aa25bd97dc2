"""Keeps a client's text apart from what the chat template writes, so that no text becomes a control token.

Every added token of a tokenizer begins with one of a few characters (mostly with "<"). While the template renders,
private-use characters that the client's text does not have stand in it for these: it has then no beginning of an added
token, also not of one that the template would join from two pieces. What is found in the rendered text is the
template's own, and the rest is encoded as text, with its own characters again.

transformers 5.23 has `apply_chat_template(sanitize_control_tokens=True)`, which marks whole tokens only: pieces that a
template joins, keys of objects, and text that has its marks itself are not kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from vitrine_vlm.errors import BadRequest

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_NUM_TRIED = 8
_Change: TypeAlias = Callable[[str], str]


@dataclass(frozen=True)
class ChatText:
    """A chat as its template has written it.

    marks: by the character that stands in `text` for one of the client's, the client's; each is one character long.
    """

    text: str
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def unmarked(self) -> str:
        """The text with the client's own characters; as long as `text`."""
        text = self.text
        for mark, character in self.marks.items():
            text = text.replace(mark, character)
        return text


class TextMarks:
    """Marks one request's text.

    marks: see `ChatText`.

    Args:
        firsts: the first characters of all added tokens.
        texts: all of the client's text.

    Raises:
        BadRequest: the text has all of Unicode's private-use characters.
    """

    def __init__(self, firsts: str, texts: Iterable[str]) -> None:
        all_texts = list(texts)
        present = [first for first in firsts if any(first in text for text in all_texts)]
        self.marks: dict[str, str] = {}
        for mark, first in zip(_free_characters(all_texts) if present else (), present, strict=False):
            self.marks[mark] = first
        if len(self.marks) < len(present):
            raise BadRequest("the text has all private-use characters of Unicode, of which this worker needs one")

    def mark(self, text: str) -> str:
        for mark, character in self.marks.items():  # `translate` with a table is much slower
            text = text.replace(character, mark)
        return text

    def mark_but(self, kept: re.Pattern[str], text: str) -> str:
        """Marks the text around what `kept`, which has one group, matches."""
        pieces = kept.split(text)
        pieces[::2] = map(self.mark, pieces[::2])
        return "".join(pieces)


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from strings_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings_in(each)


def with_strings(value: Any, change: _Change) -> Any:
    """A JSON value with each string of it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): with_strings(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [with_strings(each, change) for each in value]
    return value


def _free_characters(texts: Sequence[str]) -> Iterator[str]:
    """Private-use characters that no text has."""
    tried = [chr(each) for each in _PRIVATE_USE[:_NUM_TRIED]]
    yield from (each for each in tried if not any(each in text for text in texts))
    # A text made to have them would cost a look through it for each: from here on all at once.
    taken = set().union(*texts)
    yield from (each for each in map(chr, _PRIVATE_USE[_NUM_TRIED:]) if each not in taken)


class TextEncoder:
    """Encodes text in which added tokens are recognized only where they are meant.

    Args:
        tokenizer: the checkpoint's.
        added: the id of each added token, special or not.
    """

    def __init__(self, tokenizer: Tokenizer, added: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # The same model without added tokens: `encode_special_tokens` would still recognize those that are not special.
        self._text_only = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._text_only.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._text_only.pre_tokenizer = tokenizer.pre_tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text in which every added token is meant. Safe on any thread."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_chat(self, chat: ChatText) -> list[int]:
        """Returns the ids of a chat, in whose marked text no added token is meant. Safe on any thread."""
        unmarked = chat.unmarked
        if not chat.marks or self._places(unmarked) == (meant := self._places(chat.text)):
            return self.encode(unmarked)
        ids: list[int] = []
        done = 0
        for start, stop in meant:
            ids += self._encode_text(unmarked[done:start])
            ids.append(self._added[unmarked[start:stop]])
            done = stop
        return ids + self._encode_text(unmarked[done:])

    def _places(self, text: str) -> list[tuple[int, int]]:
        return [each.span() for each in self._pattern.finditer(text)]

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._text_only.encode(text, add_special_tokens=False).ids
        return ids
