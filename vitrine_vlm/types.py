"""The values that travel between the two services, free of protobuf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch

PROTOCOL_VERSION = 1

MediaKind = Literal["image", "video"]
TransportName = Literal["cuda_ipc", "shm", "grpc"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def content_key(data: bytes | None, url: str | None) -> bytes:
    """SHA-256 over an item's bytes, or its address where it has none. Takes a while for a long video."""
    return hashlib.sha256(data if data is not None else (url or "").encode()).digest()


@dataclass(frozen=True)
class MediaItem:
    """One image or video of a request: an address (`url`) or the encoded file itself (`data`), never both."""

    kind: MediaKind
    url: str | None = None
    data: bytes | None = None
    video_fps: float | None = None

    def __post_init__(self) -> None:
        if (self.url is None) == (self.data is None):
            raise ValueError("a media item needs either url or data")

    @cached_property
    def content_key(self) -> bytes:
        """See `content_key` above; hashed once, at the first use."""
        return content_key(self.data, self.url)


class RowFormat(Protocol):
    """What rows look like. dtype: a name of DTYPES; row_width: elements in one row."""

    @property
    def dtype(self) -> str: ...

    @property
    def row_width(self) -> int: ...

    @property
    def row_nbytes(self) -> int: ...


@dataclass(frozen=True)
class ModelIdentity:
    """What an encoder serves and what a worker needs; the two must agree field by field.

    `out_hidden_size` is in elements; a row holds `out_hidden_size * (1 + len(deepstack_visual_indexes))` of them.
    """

    model: str
    revision: str
    model_type: str
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    dtype: str
    protocol_version: int = PROTOCOL_VERSION

    @property
    def row_width(self) -> int:
        """Elements in one row."""
        return self.out_hidden_size * (1 + len(self.deepstack_visual_indexes))

    @property
    def row_nbytes(self) -> int:
        return self.row_width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """Size of one media item, known before the ViT runs.

    grid_thw: patches along time, height, width.
    num_tokens: rows, t * (h / merge_size) * (w / merge_size).
    timestamps_s: video only, seconds, one per temporal patch.
    second_per_grid_t: video only, seconds between temporal patches.
    content_hash: SHA-256, 32 bytes.
    """

    kind: MediaKind
    grid_thw: tuple[int, int, int]
    num_tokens: int
    timestamps_s: tuple[float, ...] = ()
    second_per_grid_t: float = 0.0
    content_hash: bytes = b""


@dataclass(frozen=True)
class ItemTimings:
    """Where the time of one item went, in milliseconds; `ship_ms` is added by the receiving side."""

    load_ms: float = 0.0
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    forward_ms: float = 0.0
    export_ms: float = 0.0
    ship_ms: float = 0.0


class EmbeddingRows(Protocol):
    """Rows of one media item on the receiving side, readable until released.

    The memory may belong to the encoder: read it with `copy_to` and call `release` exactly once, also on errors.
    """

    num_tokens: int
    timings: ItemTimings

    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        """Copies rows [first_row, first_row + T) into the caller's buffers; on a GPU only launched.

        What was copied counts if `check` passes when the copy is through.

        Args:
            main_TD: destination of the main embedding, [T, out_hidden_size], any strides over T.
            deepstack_NTD: destination of the deepstack layers, [num_deepstack, T, out_hidden_size], or None.
            first_row: first row of this item to copy.
        """
        ...

    def queue_check(self) -> Callable[[], None]:
        """A `check` of what was copied so far, to be called when the current stream is through with all it was given.

        On a GPU the stream has looked by then, which spares `check` its own look.
        """
        ...

    def check(self) -> None:
        """Whatever was copied so far is right; to be called when all copies, also those of a GPU, are through.

        Raises:
            LeaseExpired: the encoder reclaimed the memory, before, while or after it was copied.
        """
        ...

    def release(self) -> None:
        """Gives the memory back. Later calls do nothing. Never blocks and never raises."""
        ...


@dataclass(frozen=True)
class LayoutEvent:
    """Item `item_index` of the request has this size."""

    item_index: int
    layout: Layout


@dataclass(frozen=True)
class RowsEvent:
    """Item `item_index` is encoded."""

    item_index: int
    rows: EmbeddingRows = field(repr=False)


EncodeEvent = LayoutEvent | RowsEvent
