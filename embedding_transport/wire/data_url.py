"""The one reader of data: URLs, for all services.

It reads what browsers read (WHATWG Fetch, section "data: URLs", and its forgiving base64 decoding): any case of scheme
and `base64`, parameters, percent escapes, white space and missing padding in base64. The URL-safe alphabet is not
base64 there, nor here. Stricter than there, a "%" without two digits is refused.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote_to_bytes

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vitrine_vlm.errors import MediaError, MediaTooLarge

_BASE64 = TypeAdapter(bytes, config=ConfigDict(val_json_bytes="base64"))
_SCHEME = "data:"
_IS_BASE64 = re.compile(r";[ ]*base64[ ]*$", re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_WHITE_SPACE = b" \t\n\r\f"
# Characters of a URL that become one byte: "%41" percent-encoded, "%41%41%41%41" for three bytes in base64.
_MAX_CHARS_A_BYTE = 4
_MAX_WHITE_SPACE = 1 << 20
# Decoded by one call, which holds the interpreter's lock: a tenth of a millisecond. A multiple of 4.
_PIECE_CHARS = 1 << 16


def is_data_url(url: str) -> bool:
    return url[: len(_SCHEME)].lower() == _SCHEME


@dataclass(frozen=True)
class DataUrl:
    """Where the parts of a data: URL are. A payload may be long, so it is not copied as a whole.

    media_type: in lower case, without parameters. begin, end: of the payload in `url`, without a fragment.
    """

    url: str
    media_type: str
    is_base64: bool
    begin: int
    end: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """
        Raises:
            MediaError: the URL has no comma.
        """
        comma = url.find(",", len(_SCHEME))
        if comma < 0:
            raise MediaError(f"a data: URL of {len(url)} characters has no comma: expected data:<type>;base64,<data>")
        header = url[len(_SCHEME) : comma]
        fragment = url.find("#", comma)
        media_type = header.partition(";")[0].strip().lower()
        is_base64 = _IS_BASE64.search(header) is not None
        return cls(url, media_type, is_base64, comma + 1, len(url) if fragment < 0 else fragment)

    @property
    def payload(self) -> str:
        return self.url[self.begin : self.end]


def read_data_url(url: str, max_nbytes: int | None = None) -> bytes:
    """The bytes in a data: URL.

    Args:
        max_nbytes: bytes that are accepted; checked before they are copied, as far as the URL's length says.

    Raises:
        MediaError: the URL is malformed.
        MediaTooLarge: more than `max_nbytes` bytes.
    """
    parts = DataUrl.parse(url)
    if max_nbytes is not None and parts.end - parts.begin > _MAX_CHARS_A_BYTE * max_nbytes + _MAX_WHITE_SPACE:
        raise MediaTooLarge(f"a data: URL of {len(url)} characters: at most {max_nbytes} bytes are accepted")
    try:
        data = (decode_base64 if parts.is_base64 else _decode_escapes)(url, parts.begin, parts.end)
    except UnicodeEncodeError as error:
        raise MediaError(f"a data: URL of {len(url)} characters is not plain ASCII: escape it or use base64") from error
    except ValueError as error:
        raise MediaError(f"a data: URL of {len(url)} characters is not valid: {error}") from error
    if max_nbytes is not None and len(data) > max_nbytes:
        raise MediaTooLarge(f"a data: URL of {len(data)} bytes: at most {max_nbytes} are accepted")
    return data


def decode_base64(text: str, begin: int = 0, end: int | None = None) -> bytes:
    """Decodes base64 as browsers do, a piece at a time: other threads get the interpreter's lock in between.

    Args:
        begin, end: of the base64 in `text`; by default all of it.

    Raises:
        ValueError: it is not valid base64.
    """
    end = len(text) if end is None else end
    if (end - begin) % 4 == 0:
        with suppress(_NotPlain):
            return b"".join(_plain_pieces(text, begin, end))
    return b"".join(_base64_pieces(text, begin, end))


class _NotPlain(Exception):
    """Base64 with white space, escapes or without padding, or what is none."""


def _plain_pieces(text: str, begin: int, end: int) -> Iterator[bytes]:
    """Decodes base64 as it mostly is, in half of the base64 module's time.

    Raises:
        _NotPlain: it is not.
    """
    for at in range(begin, end, _PIECE_CHARS):
        piece = text[at : min(at + _PIECE_CHARS, end)]
        # Pydantic also accepts missing padding and the URL-safe alphabet; otherwise it decodes as the base64 module
        # does. Padding is the end.
        is_last = at + _PIECE_CHARS >= end
        if "-" in piece or "_" in piece or (piece.endswith("=") and not is_last):
            raise _NotPlain
        try:
            yield _BASE64.validate_strings(piece)
        except ValidationError:
            raise _NotPlain from None


def _base64_pieces(text: str, begin: int, end: int) -> Iterator[bytes]:
    """
    Raises:
        ValueError: see `decode_base64`.
    """
    rest = b""
    for piece in _unescaped_pieces(text, begin, end):
        characters = rest + piece.translate(None, _WHITE_SPACE)
        whole = max(0, len(characters) - 1) // 4 * 4  # padding may be behind it
        if b"=" in characters[:whole]:
            raise ValueError("it is not base64: its padding is not at its end")
        yield _decoded(characters[:whole])
        rest = characters[whole:]
    if len(rest) % 4 == 0:
        rest = rest[:-2] + rest[-2:].rstrip(b"=")
    if b"=" in rest or len(rest) % 4 == 1:
        raise ValueError("it is not base64: its padding is wrong, or it was cut short")
    yield _decoded(rest + b"=" * (-len(rest) % 4))


def _decoded(characters: bytes) -> bytes:
    try:
        return binascii.a2b_base64(characters, strict_mode=True)
    except binascii.Error as error:
        raise ValueError(f"it is not base64: {error}") from error


def _decode_escapes(text: str, begin: int, end: int) -> bytes:
    """
    Raises:
        ValueError: see `_unescaped`.
    """
    return b"".join(_unescaped_pieces(text, begin, end))


def _unescaped_pieces(text: str, begin: int, end: int) -> Iterator[bytes]:
    """
    Raises:
        ValueError: see `_unescaped`.
    """
    while begin < end:
        stop = min(begin + _PIECE_CHARS, end)
        percent = text.rfind("%", max(begin, stop - 2), stop)
        if percent >= 0:  # its digits belong to this piece
            stop = min(percent + 3, end)
        yield _unescaped(text[begin:stop])
        begin = stop


def _unescaped(piece: str) -> bytes:
    """
    Raises:
        ValueError: a "%" without two hexadecimal digits behind it; UnicodeEncodeError: characters beyond ASCII.
    """
    data = piece.encode("ascii")
    if "%" not in piece:
        return data
    if _BAD_ESCAPE.search(piece):
        raise ValueError("it has a % without two hexadecimal digits behind it")
    return unquote_to_bytes(data)
