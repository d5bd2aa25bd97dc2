"""Writes one object as a pickle, opcode by opcode: SGLang's receivers read nothing else.

Nothing is ever unpickled here, and no library for it is imported: objects would run code of their sender.
Source of the opcodes: CPython 3.11, Lib/pickletools.py; all are of protocol 2.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

_PROTOCOL_2 = b"\x80\x02"
_STOP = b"."
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_INT32, _LONG, _FLOAT, _TEXT = b"J", b"\x8a", b"G", b"X"
_MARK, _EMPTY_LIST, _APPEND_ALL, _EMPTY_DICT, _SET_ALL = b"(", b"]", b"e", b"}", b"u"
_GLOBAL, _EMPTY_TUPLE, _TUPLE_OF_1, _NEW_OBJECT, _CALL, _SET_STATE = b"c", b")", b"\x85", b"\x81", b"R", b"b"


@dataclass(frozen=True)
class Global:
    """A name that the reader imports, such as a class. Both are of our own choosing, never a peer's."""

    module: str
    name: str


@dataclass(frozen=True)
class EnumMember:
    """The member of an enum class that has this value."""

    enum: Global
    value: int


Value: TypeAlias = "bool | int | float | str | Global | EnumMember | Sequence[Value] | None"


def pickled_object(class_: Global, state: Mapping[str, Value]) -> bytes:
    """Returns the pickle of an object that is made without calling its `__init__` and has the attributes `state`."""
    items = b"".join(_pickled(name) + _pickled(value) for name, value in state.items())
    made = _pickled(class_) + _EMPTY_TUPLE + _NEW_OBJECT
    return _PROTOCOL_2 + made + _EMPTY_DICT + _MARK + items + _SET_ALL + _SET_STATE + _STOP


def _pickled(value: Value) -> bytes:
    match value:
        case None:
            return _NONE
        case bool():
            return _TRUE if value else _FALSE
        case int():
            return _pickled_int(value)
        case float():
            return _FLOAT + struct.pack(">d", value)
        case str():
            # JSON may hold lone surrogates; readers decode them like this, too.
            text = value.encode("utf-8", "surrogatepass")
            return _TEXT + struct.pack("<I", len(text)) + text
        case Global():
            return _GLOBAL + f"{value.module}\n{value.name}\n".encode("ascii")
        case EnumMember():
            return _pickled(value.enum) + _pickled(value.value) + _TUPLE_OF_1 + _CALL
        case _:
            return _EMPTY_LIST + _MARK + b"".join(map(_pickled, value)) + _APPEND_ALL


def _pickled_int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return _INT32 + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return _LONG + bytes([len(data)]) + data
