"""Bounds of a JSON text, checked before it is parsed: a parser holds the interpreter's lock for all of it.

A million numbers take 0.05 to 0.1 s, and so do 64Ki names of fields, or a million escapes. The digits of one number
take a time that grows by the square of their number.
"""

from __future__ import annotations

import re

from vitrine_vlm.errors import BadRequest

MAX_VALUES = 1_000_000
MAX_NAMES = 64 * 1024
MAX_STRINGS = 256 * 1024
MAX_ESCAPES = 1_000_000
MAX_DIGITS = 400
MAX_BYTES_OUTSIDE_STRINGS = 8 * 1024 * 1024
# Smaller bodies take less than 0.05 s, whatever they have.
_SMALL_BYTES = 256 * 1024
# Those of a size in between that have few names and values in any case.
_MIDDLE_BYTES = 1024 * 1024
# Looked through at once: a thread that launches work gets the lock in between, a hundred times a step on a CPU.
_SLICE_BYTES = 32 * 1024
_BACKSLASH = ord("\\")
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))


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
    # Most bodies have few enough with those in strings, and no room for many long numbers.
    if len(body) > _MIDDLE_BYTES or _count(body, b":") > MAX_NAMES or num_values(body, MAX_VALUES) > MAX_VALUES:
        _check_outside_strings(body)


def num_values(body: bytes, enough: int) -> int:
    """A number of values that the text has at most, to which commas and brackets in strings count; counted no further
    than a little above `enough`."""
    num = 1
    for begin in range(0, len(body), _SLICE_BYTES):
        end = begin + _SLICE_BYTES
        num += body.count(b",", begin, end) + body.count(b"[", begin, end) + body.count(b"{", begin, end)
        if num > enough:
            break
    return num


def _count(body: bytes, character: bytes) -> int:
    return sum(body.count(character, begin, begin + _SLICE_BYTES) for begin in range(0, len(body), _SLICE_BYTES))


def _check_outside_strings(body: bytes) -> None:
    values, names, strings, num_bytes, begin = 1, 0, 0, 0, 0
    in_string, before = False, b""
    while begin < len(body):
        end = _end_of_slice(body, begin)
        if in_string and body.find(b'"', begin, end) < 0:
            begin = end
            continue
        # Of what quotation marks separate, every other part is outside of strings.
        parts = _ESCAPE.sub(b"", body[begin:end]).split(b'"')
        outside = b"".join(parts[in_string::2])
        num_bytes += len(outside)
        values += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        names += outside.count(b":")
        strings += (len(parts) - in_string) // 2
        for what, num, most in (
            ("values", values, MAX_VALUES),
            ("names of fields", names, MAX_NAMES),
            ("strings", strings, MAX_STRINGS),
            ("bytes outside of strings", num_bytes, MAX_BYTES_OUTSIDE_STRINGS),
        ):
            if num > most:
                raise BadRequest(f"the body has more than {most} {what}, the most that are accepted: send less at once")
        before = before[-MAX_DIGITS:] + outside  # a number may be cut by the end of a slice
        if _LONG_NUMBER.search(before):
            raise BadRequest(f"the body has a number of more than {MAX_DIGITS} digits: send a shorter one")
        in_string ^= len(parts) % 2 == 0
        begin = end


def _end_of_slice(body: bytes, begin: int) -> int:
    """The end of the next slice, which cuts no escape."""
    end = min(begin + _SLICE_BYTES, len(body))
    while end < len(body) and body[end - 1] == _BACKSLASH:
        end += 1
    return end
