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

from tokenizers import AddedToken, Tokenizer

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.prompt.text_pieces import can_be_cut, pieces_of

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_NUM_TRIED = 8
# A call of the tokenizer for a longer text runs without the interpreter's lock; that costs a short one more than it is.
_SHORT_TEXT = 4 * 1024
# Characters that one call looks through while it holds the lock.
_LOOK_CHARS = 256 * 1024
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
    taken: set[str] = set()
    for text in texts:
        for begin in range(0, len(text), _LOOK_CHARS):
            taken.update(text[begin : begin + _LOOK_CHARS])
    yield from (each for each in map(chr, _PRIVATE_USE[_NUM_TRIED:]) if each not in taken)


@dataclass(frozen=True)
class _Stretch:
    """Text of a prompt that is encoded by itself, with the tokenizer that reads it."""

    tokenizer: Tokenizer
    text: str


class TextEncoder:
    """Encodes text in which added tokens are recognized only where they are meant.

    Args:
        tokenizer: the checkpoint's.
        added: each added token by its id, special or not.
    """

    def __init__(self, tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> None:
        self._tokenizer = tokenizer
        self._added = {token.content: token_id for token_id, token in added.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # The same model without added tokens: `encode_special_tokens` would still recognize those that are not special.
        self._text_only = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._text_only.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._text_only.pre_tokenizer = tokenizer.pre_tokenizer
        self._can_be_cut = can_be_cut(tokenizer, added.values())

    def encode(self, prompt: str | ChatText) -> list[int]:
        """Returns the ids of a text in which every added token is meant, or of a chat. Safe on any thread."""
        return [token_id for ids in self.encode_in_pieces(prompt) for token_id in ids]

    def encode_in_pieces(self, prompt: str | ChatText, from_end: bool = False) -> Iterator[list[int]]:
        """Yields the same ids in lists, each of which is computed when it is asked for. Safe on any thread.

        Args:
            from_end: the last list first.
        """
        pieces = self._pieces(prompt)
        for each in reversed(list(pieces)) if from_end else pieces:
            yield [each] if isinstance(each, int) else _encode(each)

    def _pieces(self, prompt: str | ChatText) -> Iterator[_Stretch | int]:
        """The prompt as pieces of text and ids of added tokens."""
        if isinstance(prompt, str):
            yield from self._cut(self._tokenizer, prompt)
            return
        unmarked = prompt.unmarked
        if not prompt.marks or self._places(unmarked) == (meant := self._places(prompt.text)):
            yield from self._cut(self._tokenizer, unmarked)
            return
        done = 0
        for start, stop in meant:
            yield from self._cut(self._text_only, unmarked[done:start])
            yield self._added[unmarked[start:stop]]
            done = stop
        yield from self._cut(self._text_only, unmarked[done:])

    def _cut(self, tokenizer: Tokenizer, text: str) -> Iterator[_Stretch]:
        for piece in pieces_of(text) if self._can_be_cut else (text,):
            yield _Stretch(tokenizer, piece)

    def _places(self, text: str) -> list[tuple[int, int]]:
        return [each.span() for each in self._pattern.finditer(text)]


def _encode(stretch: _Stretch) -> list[int]:
    text = stretch.text
    if len(text) <= _SHORT_TEXT:
        ids: list[int] = stretch.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
    # `encode` holds the interpreter's lock, which a batch does not.
    (encoding,) = stretch.tokenizer.encode_batch_fast([text], add_special_tokens=False)
    ids = encoding.ids
    return ids
