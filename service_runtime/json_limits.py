"""Bounds of a JSON text, checked before it is parsed: a parser holds the interpreter's lock for all of it.

A million numbers take 0.05 to 0.1 s, and so do 64Ki names of fields, or a million escapes. The digits of one number
take a time that grows by the square of their number.
"""

from __future__ import annotations

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
# Looked through at once, which takes two milliseconds at most.
_SLICE_BYTES = 64 * 1024
_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)


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
    # In pieces: a loop over strings would take the interpreter from other threads for tenths of a second.
    values, names, strings, num_bytes, digits = 1, 0, 0, 0, b""
    begin, in_string = 0, False
    while begin < len(body):
        end = _end_of_slice(body, begin)
        parts = _without_escapes(body[begin:end]).split(b'"')
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
        digits = digits[-MAX_DIGITS:] + outside.translate(_ZEROS)
        if b"0" * (MAX_DIGITS + 1) in digits:
            raise BadRequest(f"the body has a number of more than {MAX_DIGITS} digits: send a shorter one")
        in_string ^= len(parts) % 2 == 0
        begin = _next_quote(body, end) if in_string else end


def _end_of_slice(body: bytes, begin: int) -> int:
    """The end of the slice that begins here: never in the middle of an escape."""
    end = min(begin + _SLICE_BYTES, len(body))
    while end < len(body) and body[end - 1] == ord("\\"):
        end += 1
    return end


def _without_escapes(text: bytes) -> bytes:
    """The text without those escapes that could be taken for the beginning or the end of a string."""
    return text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text


def _next_quote(body: bytes, begin: int) -> int:
    """The place of the next quotation mark, with the backslashes in front of it; the end of the text without one."""
    quote = body.find(b'"', begin)
    while quote > begin and body[quote - 1] == ord("\\"):
        quote -= 1
    return quote if quote >= 0 else len(body)
