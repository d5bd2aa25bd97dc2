"""The one reader of data: URLs, for all services.

It reads what browsers read (WHATWG Fetch, section "data: URLs", and its forgiving base64 decoding): any case of scheme
and `base64`, parameters, percent escapes, white space and missing padding in base64. The URL-safe alphabet is not
base64 there, nor here. Stricter than there, a "%" without two digits is refused.
"""

from __future__ import annotations

import binascii
import re
from contextlib import suppress
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


def is_data_url(url: str) -> bool:
    return url[: len(_SCHEME)].lower() == _SCHEME


def split_data_url(url: str) -> tuple[str, bool, str]:
    """The media type in lower case without parameters, whether the rest is base64, and the rest, without a fragment.

    Raises:
        MediaError: the URL has no comma.
    """
    header, comma, payload = url[len(_SCHEME) :].partition(",")
    if not comma:
        raise MediaError(f"a data: URL of {len(url)} characters has no comma: expected data:<type>;base64,<data>")
    payload = payload.partition("#")[0] if "#" in payload else payload
    return header.partition(";")[0].strip().lower(), _IS_BASE64.search(header) is not None, payload


def read_data_url(url: str, max_nbytes: int | None = None) -> bytes:
    """The bytes in a data: URL.

    Args:
        max_nbytes: bytes that are accepted; checked before they are copied, as far as the URL's length says.

    Raises:
        MediaError: the URL is malformed.
        MediaTooLarge: more than `max_nbytes` bytes.
    """
    _, is_base64, payload = split_data_url(url)
    if max_nbytes is not None and len(payload) > _MAX_CHARS_A_BYTE * max_nbytes + _MAX_WHITE_SPACE:
        raise MediaTooLarge(f"a data: URL of {len(url)} characters: at most {max_nbytes} bytes are accepted")
    try:
        data = decode_base64(payload) if is_base64 else _unescaped(payload)
    except UnicodeEncodeError as error:
        raise MediaError(f"a data: URL of {len(url)} characters is not plain ASCII: escape it or use base64") from error
    except ValueError as error:
        raise MediaError(f"a data: URL of {len(url)} characters is not valid: {error}") from error
    if max_nbytes is not None and len(data) > max_nbytes:
        raise MediaTooLarge(f"a data: URL of {len(data)} bytes: at most {max_nbytes} are accepted")
    return data


def decode_base64(payload: str) -> bytes:
    """Decodes base64 as browsers do, and holds the interpreter lock for a fraction of the base64 module's time.

    Raises:
        ValueError: it is not valid base64.
    """
    # Pydantic also accepts missing padding and the URL-safe alphabet; otherwise it decodes as the base64 module does.
    if len(payload) % 4 == 0 and "-" not in payload and "_" not in payload:
        with suppress(ValidationError):
            return _BASE64.validate_strings(payload)
    characters = _unescaped(payload).translate(None, _WHITE_SPACE)
    if len(characters) % 4 == 0:
        characters = characters[:-2] + characters[-2:].rstrip(b"=")
    if b"=" in characters or len(characters) % 4 == 1:
        raise ValueError("it is not base64: its padding is wrong, or it was cut short")
    try:
        return binascii.a2b_base64(characters + b"=" * (-len(characters) % 4), strict_mode=True)
    except binascii.Error as error:
        raise ValueError(f"it is not base64: {error}") from error


def _unescaped(payload: str) -> bytes:
    """
    Raises:
        ValueError: a "%" without two hexadecimal digits behind it; UnicodeEncodeError: characters beyond ASCII.
    """
    data = payload.encode("ascii")
    if "%" not in payload:
        return data
    if _BAD_ESCAPE.search(payload):
        raise ValueError("it has a % without two hexadecimal digits behind it")
    return unquote_to_bytes(data)
