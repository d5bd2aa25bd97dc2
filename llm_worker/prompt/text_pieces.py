"""Cuts a long text into pieces that have the tokens of the whole text, one after another.

The pre-tokenizers of the checkpoints that are served are one regular expression, which matches from left to right,
looks at no character behind itself and at most at one ahead of itself (`\\s+(?!\\S)`). So what is matched from a place
on depends on the text from there on only, and a text may be cut where one match ends and the next begins. These are
such places:

- In front of a space with no white space before it. A space is the first character of a match, or follows other white
  space in it.
- Between a letter or digit and one of `\\n.,` or the Chinese comma and full stop. No alternative has a letter, mark or
  digit in front of another character.

The look ahead of a match that ends earlier sees the same character on either side of the cut, and none with a look
ahead ends in anything but white space. NFC changes nothing across a cut, either: the character behind it is no mark and
composes with nothing (UAX #15). Added tokens are found first; none may have such a place in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from vitrine_vlm.errors import BadRequest

PIECE_CHARS = 32 * 1024
# Of text without a place to cut it, which takes 120 bytes of memory a character.
MAX_PIECE_CHARS = 1024 * 1024
_CUT = re.compile(r"(?<=\S)(?= )|(?<=[A-Za-z0-9\u4e00-\u9fff])(?=[\n.,\u3001\u3002\uff0c])")
_LETTERS_ONLY = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS_AND_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What tokenizer.json files of the served families have.
_KNOWN_PATTERNS = (_LETTERS_ONLY, _LETTERS_AND_MARKS)


def can_be_cut(tokenizer: Tokenizer, added: Iterable[AddedToken]) -> bool:
    """Whether the reasons above hold for this tokenizer."""
    normalizer, parts = preparation(tokenizer)
    return (
        normalizer in (None, "NFC")
        and tokenizer.truncation is None
        and tokenizer.padding is None
        and [each["type"] for each in parts] == ["Split", "ByteLevel"]
        and parts[0]["pattern"].get("Regex") in _KNOWN_PATTERNS
        and (parts[0]["behavior"], parts[0]["invert"]) == ("Isolated", False)
        and not parts[1]["add_prefix_space"]
        and not parts[1]["use_regex"]
        and not any(each.lstrip or each.rstrip or each.single_word or _CUT.search(each.content) for each in added)
    )


def preparation(tokenizer: Tokenizer) -> tuple[str | None, list[dict[str, Any]]]:
    """The type of the tokenizer's normalizer, and its pre-tokenizers with their settings."""
    bare = Tokenizer(BPE())  # the vocabulary would make the text long
    if tokenizer.normalizer is not None:
        bare.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        bare.pre_tokenizer = tokenizer.pre_tokenizer
    settings = json.loads(bare.to_str())
    pre_tokenizer = settings["pre_tokenizer"] or {"pretokenizers": []}
    return (settings["normalizer"] or {}).get("type"), pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def pieces_of(text: str) -> Iterator[str]:
    """Yields the text in pieces that are little longer than `PIECE_CHARS` where it has places to cut it.

    Raises:
        BadRequest: it has a stretch of `MAX_PIECE_CHARS` without any.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARS:
        cut = _CUT.search(text, begin + PIECE_CHARS)
        end = cut.start() if cut is not None else len(text)
        if end - begin > MAX_PIECE_CHARS:
            raise BadRequest(
                f"the text has {end - begin} characters without a space or the end of a line behind a word: at most "
                f"{MAX_PIECE_CHARS} are read as one: break it up"
            )
        yield text[begin:end]
        begin = end
    if begin < len(text) or not text:
        yield text[begin:]
