"""The values that the two services exchange, independent of protobuf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # processes that read what strangers send import these types, and would load torch for nothing
    import torch

PROTOCOL_VERSION = 1
# Describe's protocol_minor_version: 1 has patches, layouts alone and tickets; 2 options of media and lists of frames;
# 3 the release of what calls have not read; 4 rows that are computed ahead of their claim, and requests in pieces;
# 5 tickets that are renewed.
PROTOCOL_MINOR_VERSION = 5
# Frames in a video that is sent as a list of pictures.
MAX_LISTED_FRAMES = 2048

MediaKind = Literal["image", "video"]
TransportName = Literal["cuda_ipc", "shm", "grpc"]

# Bytes of an element of embeddings, by its type's name.
_ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def content_key(data: bytes | None, url: str | None) -> bytes:
    """Returns the SHA-256 of an item's bytes, or of its URL if it has no bytes. Slow for a long video."""
    return hashlib.sha256(data if data is not None else (url or "").encode()).digest()


@dataclass(frozen=True)
class Patches:
    """One image or video that the caller has preprocessed.

    data: row-major [t * h * w, 3 * temporal_patch_size * patch_size ** 2], in the order of transformers' processors.
    dtype: the element type: "uint8", "bfloat16", "float16" or "float32".
    normalized: whether the values are scaled and normalized; otherwise they are pixels, 0 to 255.
    grid_thw: patches along time, height and width.
    timestamps_s, second_per_grid_t: of videos, as in `Layout`.
    """

    data: bytes = field(repr=False)
    dtype: str
    normalized: bool
    grid_thw: tuple[int, int, int]
    timestamps_s: tuple[float, ...] = ()
    second_per_grid_t: float = 0.0


@dataclass(frozen=True)
class Ticket:
    """Claims the rows of an item whose layout an encoder has sent.

    encoder_id: the `instance_id` of that encoder.
    value: 16 bytes, chosen by the encoder.
    """

    encoder_id: str
    value: bytes


@dataclass(frozen=True)
class MediaOptions:
    """How an item is sized and sampled where that is not as the checkpoint's processor says; None: as it says.

    min_pixels, max_pixels: bounds of an image's area after resizing; of a video's sampled frames together, or of each
        frame, whichever the checkpoint's processor bounds.

    The others are of videos:

    fps: frames sampled per second; of a list of frames, the rate at which they were taken.
    num_frames: frames sampled, instead of a rate.
    min_frames, max_frames: bounds of the number of frames that are sampled by a rate; `num_frames` lies within them.
    sampled: False takes every frame.
    start_s, end_s: the part of the video that is looked at, seconds.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    sampled: bool | None = None
    start_s: float | None = None
    end_s: float | None = None

    def contradiction(self, *, is_list: bool = False) -> tuple[str, str] | None:
        """Names of two options that cannot be given together: two ways to say how many frames, or numbers that clash.

        Args:
            is_list: whether they are of a list of frames, which is not sampled.
        """
        given = {name for name, value in asdict(self).items() if value is not None}
        if self.sampled is not False:
            given.discard("sampled")
        ways: list[str] = [name for name in ("num_frames", "sampled", "fps") if name in given and not is_list]
        if "sampled" in ways:
            ways += [name for name in ("min_frames", "max_frames") if name in given]
        if len(ways) > 1:
            return ways[0], ways[1]
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("min_frames", "max_frames"),
            ("min_frames", "num_frames"),
            ("num_frames", "max_frames"),
            ("start_s", "end_s"),
        ):
            if low in given and high in given and getattr(self, low) > getattr(self, high):
                return low, high
        return None


NO_OPTIONS = MediaOptions()


@dataclass(frozen=True)
class MediaItem:
    """One image or video of a request, from one source.

    url: its address. data: the encoded file itself. frames: a video's frames, each an image with a URL or data.
    patches: the item, preprocessed. ticket: an earlier layout of it. The last two have no options.
    """

    kind: MediaKind
    url: str | None = None
    data: bytes | None = None
    frames: tuple[MediaItem, ...] | None = None
    options: MediaOptions = NO_OPTIONS
    patches: Patches | None = None
    ticket: Ticket | None = None

    def __post_init__(self) -> None:
        if (self.url, self.data, self.frames, self.patches, self.ticket).count(None) != 4:
            raise ValueError("a media item needs exactly one of url, data, frames, patches and ticket")

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded file, of all frames, or of patches; 0 where only the encoder will know."""
        if self.frames is not None:
            return sum(frame.nbytes for frame in self.frames)
        return len(self.patches.data) if self.patches is not None else len(self.data or b"")

    @cached_property
    def content_key(self) -> bytes:
        """The key by which this item is routed: of its content and options. Computed once; slow for a long video."""
        if self.ticket is not None:
            return self.ticket.value
        if self.frames is not None:
            key = hashlib.sha256(b"".join(frame.content_key for frame in self.frames)).digest()
        else:
            key = content_key(self.data if self.patches is None else self.patches.data, self.url)
        return key if self.options == NO_OPTIONS else hashlib.sha256(repr(self.options).encode() + key).digest()


class RowFormat(Protocol):
    """The format of rows. `dtype` is a name in ROW_DTYPES; `row_width` is the number of elements in one row."""

    @property
    def dtype(self) -> str: ...

    @property
    def row_width(self) -> int: ...

    @property
    def row_nbytes(self) -> int: ...


@dataclass(frozen=True)
class ModelIdentity:
    """The model that an encoder serves or a worker needs; the two must be equal in every field.

    A row has `out_hidden_size * (1 + len(deepstack_visual_indexes))` elements.
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
        """The number of elements in one row."""
        return self.out_hidden_size * (1 + len(self.deepstack_visual_indexes))

    @property
    def row_nbytes(self) -> int:
        return self.row_width * _ITEM_NBYTES[self.dtype]


@dataclass(frozen=True)
class ExpectedTime:
    """How long an item's rows will take, as its encoder announces it.

    queue_s: seconds of work in front of the item; encode_s: of its own.
    """

    queue_s: float
    encode_s: float


@dataclass(frozen=True)
class Layout:
    """The size of one media item, known before the ViT runs.

    grid_thw: patches along time, height and width.
    num_tokens: the number of rows, t * (h / merge_size) * (w / merge_size).
    timestamps_s: video only, seconds, one per temporal patch.
    second_per_grid_t: video only, seconds between temporal patches.
    content_hash: SHA-256, 32 bytes.
    ticket: claims the rows, where layouts alone were asked for.
    expected: None where the rows are there already, or nothing is announced.
    """

    kind: MediaKind
    grid_thw: tuple[int, int, int]
    num_tokens: int
    timestamps_s: tuple[float, ...] = ()
    second_per_grid_t: float = 0.0
    content_hash: bytes = b""
    ticket: Ticket | None = field(default=None, compare=False)
    expected: ExpectedTime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ItemTimings:
    """The time of one item by stage, in milliseconds; the receiving side adds `ship_ms`."""

    load_ms: float = 0.0
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    forward_ms: float = 0.0
    export_ms: float = 0.0
    ship_ms: float = 0.0


class EmbeddingRows(Protocol):
    """The rows of one media item on the receiving side, readable until released.

    The memory may belong to the encoder: read it with `copy_to`, and call `release` also after errors.
    """

    num_tokens: int
    timings: ItemTimings

    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        """Copies rows [first_row, first_row + T) into the caller's buffers; on a GPU the copy is only launched.

        The copied rows are valid if `check` passes after the copy.

        Args:
            main_TD: the destination of the main embedding, [T, out_hidden_size], with any stride over T.
            deepstack_NTD: the destination of the deepstack layers, [num_deepstack, T, out_hidden_size], or None.
            first_row: the first row of this item to copy.
        """
        ...

    def queue_check(self) -> Callable[[], None]:
        """Returns a `check` of the rows copied so far; call it once the current stream has run all its present work.

        On a GPU the stream copies the block's header to the host by then, so that the check does not have to.
        """
        ...

    def check(self) -> None:
        """Checks that all rows copied so far are valid; call it once all copies, also those of a GPU, are done.

        Raises:
            LeaseExpired: the encoder released the memory before, during or after the copy.
        """
        ...

    def release(self) -> None:
        """Releases the memory. Later calls do nothing. Never blocks and never raises."""
        ...


@dataclass(frozen=True)
class LayoutEvent:
    """The layout of item `item_index` of the request."""

    item_index: int
    layout: Layout


@dataclass(frozen=True)
class RowsEvent:
    """The rows of item `item_index` of the request."""

    item_index: int
    rows: EmbeddingRows = field(repr=False)


EncodeEvent = LayoutEvent | RowsEvent
