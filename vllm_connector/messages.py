"""The messages between the scheduler's process and the workers: with vLLM's steps, and on the worker channel.

A frame of the worker channel is two lengths (header u32, payload u64, little-endian), a JSON header, and the payload,
which is raw bytes of rows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vitrine_vlm.dtypes import DTYPES

LENGTHS = struct.Struct("<IQ")
MAX_HEADER_NBYTES = 64 * 1024
# As for one item from an encoder: a false length must not exhaust the memory.
MAX_PAYLOAD_NBYTES = 4 * 1024**3


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hello(_Message):
    """A worker's first message. `device` is the type of its device: "cuda" or "cpu"."""

    rank: int = Field(ge=0)
    device: str


class Rows(_Message):
    """The rows of one delivery, [num_tokens, row_width] of a dtype of DTYPES."""

    delivery_id: int
    num_tokens: int = Field(gt=0)
    row_width: int = Field(gt=0)
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def nbytes(self) -> int:
        return self.num_tokens * self.row_width * DTYPES[self.dtype].itemsize


class Map(_Message):
    """Asks to map a pool and to read its nonce. `source` is that of `pool_source.map_source`."""

    kind: Literal["map"] = "map"
    pool_id: int
    source: dict[str, str | int]
    probe_offset: int
    probe_nbytes: int


class Unmap(_Message):
    kind: Literal["unmap"] = "unmap"
    pool_id: int


class Land(_Message):
    """Asks to copy leased rows out of a mapped pool."""

    kind: Literal["land"] = "land"
    pool_id: int
    rows: Rows
    lease_id: int
    generation: int
    offset: int


class LandBytes(_Message):
    """Asks to keep the rows that are the frame's payload."""

    kind: Literal["land_bytes"] = "land_bytes"
    rows: Rows


class Discard(_Message):
    """Asks to free the rows of a delivery that no step has loaded."""

    kind: Literal["discard"] = "discard"
    delivery_id: int


Command = Map | Unmap | Land | LandBytes | Discard


class Request(_Message):
    """A command with a number, which its answer repeats."""

    number: int
    command: Annotated[Command, Field(discriminator="kind")]


@dataclass(frozen=True)
class StepCommands:
    """What the workers are to do before a step. vLLM sends it to them, with the step.

    loads: delivery ids by the identifier in the encoder cache.
    discards: delivery ids whose rows no request needs any more.
    """

    loads: Mapping[str, int]
    discards: list[int]


class Answer(_Message):
    """The answer to a request: `code` of `errors` and `error` where it failed; `nonce` (hex) of a mapped pool."""

    number: int
    code: str = ""
    error: str = ""
    nonce: str = ""


def pack_frame(message: BaseModel, payload_nbytes: int = 0) -> bytes:
    """Returns the lengths and the header; the payload follows them."""
    header = message.model_dump_json().encode()
    return LENGTHS.pack(len(header), payload_nbytes) + header


def unpack_lengths(raw: bytes) -> tuple[int, int]:
    """Returns the lengths of header and payload.

    Raises:
        ValueError: one of them is too large.
    """
    header_nbytes, payload_nbytes = LENGTHS.unpack(raw)
    if header_nbytes > MAX_HEADER_NBYTES or payload_nbytes > MAX_PAYLOAD_NBYTES:
        raise ValueError(
            f"a frame of {header_nbytes} and {payload_nbytes} bytes on the worker channel; at most "
            f"{MAX_HEADER_NBYTES} and {MAX_PAYLOAD_NBYTES}"
        )
    return int(header_nbytes), int(payload_nbytes)
