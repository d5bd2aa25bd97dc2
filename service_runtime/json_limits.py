"""Bounds of a JSON text, checked before it is parsed: a parser holds the interpreter's lock for all of it.

A million small values take 0.05 to 0.1 s, and so do 64Ki objects' names, a million escapes, or 8 MiB of the longest
numbers.
"""

from __future__ import annotations

from vitrine_vlm.errors import BadRequest

MAX_VALUES = 1_000_000
MAX_NAMES = 64 * 1024
MAX_ESCAPES = 1_000_000
MAX_BYTES_OUTSIDE_STRINGS = 8 * 1024 * 1024
# Smaller bodies take less than 0.05 s, whatever they have.
_SMALL_BYTES = 256 * 1024
# Looked through at once.
_SLICE_BYTES = 1024 * 1024


def check_json(body: bytes) -> None:
    """
    Raises:
        BadRequest: the text has more than it may have; what it has besides is not checked.
    """
    if len(body) <= _SMALL_BYTES:
        return
    if (num_escapes := _count(body, b"\\")) > MAX_ESCAPES:
        raise BadRequest(
            f"the body's strings have {num_escapes} escapes: at most {MAX_ESCAPES} are accepted: send text as UTF-8"
        )
    # Most bodies have few enough with those in strings.
    if (
        len(body) > MAX_BYTES_OUTSIDE_STRINGS
        or _count(body, b":") > MAX_NAMES
        or num_values(body, MAX_VALUES) > MAX_VALUES
    ):
        _check_outside_strings(body)


def num_values(body: bytes, enough: int) -> int:
    """A number of values that the text has at most, to which commas and brackets in strings count; counted no further
    than a little above `enough`."""
    num = 1
    for begin in range(0, len(body), _SLICE_BYTES):
        part = body[begin : begin + _SLICE_BYTES]
        num += part.count(b",") + part.count(b"[") + part.count(b"{")
        if num > enough:
            break
    return num


def _count(body: bytes, character: bytes) -> int:
    return sum(body.count(character, begin, begin + _SLICE_BYTES) for begin in range(0, len(body), _SLICE_BYTES))


def _check_outside_strings(body: bytes) -> None:
    values, names, num_bytes, begin = 1, 0, 0, 0
    while begin < len(body):
        quote = body.find(b'"', begin)
        part = body[begin : quote if quote >= 0 else len(body)][: MAX_BYTES_OUTSIDE_STRINGS + 1]
        num_bytes += len(part)
        values += part.count(b",") + part.count(b"[") + part.count(b"{")
        names += part.count(b":")
        for what, num, most in (
            ("values", values, MAX_VALUES),
            ("names of fields", names, MAX_NAMES),
            ("bytes outside of strings", num_bytes, MAX_BYTES_OUTSIDE_STRINGS),
        ):
            if num > most:
                raise BadRequest(f"the body has more than {most} {what}, the most that are accepted: send less at once")
        begin = _end_of_string(body, quote + 1) if quote >= 0 else len(body)


def _end_of_string(body: bytes, begin: int) -> int:
    """The place behind the quotation mark that ends the string; the end of the text where none does."""
    while (quote := body.find(b'"', begin)) >= 0:
        first = quote
        while first > begin and body[first - 1] == ord("\\"):
            first -= 1
        begin = quote + 1
        if (quote - first) % 2 == 0:
            return begin
    return len(body)
