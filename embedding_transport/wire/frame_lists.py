"""Videos that are a list of pictures, in a message of either protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem


def frames_from_message(
    item: str, message: encoder_pb2.Frames | llm_pb2.Frames, files: Iterator[bytes] | None = None
) -> tuple[MediaItem, ...]:
    """The frames of an item.

    Args:
        item: what errors call it.
        files: of those that the message announces.

    Raises:
        BadRequest: no frames or too many, or one without a source.
    """
    num_frames = len(message.frames)
    if not 1 <= num_frames <= MAX_LISTED_FRAMES:
        raise BadRequest(f"{item} is a list of {num_frames} frames: give 1 to {MAX_LISTED_FRAMES}")
    sources = [(frame.WhichOneof("source"), frame) for frame in message.frames]
    if any(source is None for source, _ in sources):
        raise BadRequest(f"{item} has a frame without a source: give url or data")
    return tuple(_frame(item, source, frame, files) for source, frame in sources)


def _frame(
    item: str, source: str | None, frame: encoder_pb2.Frame | llm_pb2.Frame, files: Iterator[bytes] | None
) -> MediaItem:
    if source == "data":
        return MediaItem("image", data=frame.data)
    return MediaItem("image", url=frame.url) if source == "url" else MediaItem("image", data=next_file(item, files))


def next_file(item: str, files: Iterator[bytes] | None) -> bytes:
    """The file that an item's message announces.

    Raises:
        BadRequest: none came with the request.
    """
    data = next(files, None) if files is not None else None
    if data is None:
        raise BadRequest(f"{item} has data_nbytes: files in pieces are for EncodeInPieces")
    return data


def add_frames(message: encoder_pb2.Frames | llm_pb2.Frames, frames: Iterable[MediaItem]) -> None:
    """Writes the frames of an item to its message."""
    for frame in frames:
        if frame.data is not None:
            message.frames.add(data=frame.data)
        else:
            message.frames.add(url=frame.url or "")
