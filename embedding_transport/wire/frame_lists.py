"""Videos that come as a list of pictures: in one URL, or in a message of either protocol.

The URL's format is vLLM's (vllm/multimodal/media/video.py, `load_base64`): `data:video/jpeg;base64,` and the frames in
base64, with commas between them.
"""

from __future__ import annotations

from collections.abc import Iterable

from vitrine_vlm.embedding_transport.wire.data_url import is_data_url, split_data_url
from vitrine_vlm.errors import BadRequest, MediaTooLarge
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaKind

_TYPE = "video/jpeg"


def frames_of_url(kind: MediaKind, url: str) -> tuple[MediaItem, ...] | None:
    """Returns the frames of such a video, each with a data: URL of its own; None for any other URL.

    Raises:
        MediaTooLarge: more than MAX_LISTED_FRAMES frames.
        MediaError: the URL has no comma at all.
    """
    if kind != "video" or not is_data_url(url):
        return None
    media_type, is_base64, payload = split_data_url(url)
    if media_type != _TYPE or not is_base64:
        return None
    num_frames = payload.count(",") + 1
    if num_frames > MAX_LISTED_FRAMES:
        raise MediaTooLarge(f"a list of {num_frames} frames: at most {MAX_LISTED_FRAMES} are accepted, send fewer")
    return tuple(MediaItem("image", url=f"data:image/jpeg;base64,{frame}") for frame in payload.split(","))


def frames_from_message(item: str, message: encoder_pb2.Frames | llm_pb2.Frames) -> tuple[MediaItem, ...]:
    """The frames of an item.

    Args:
        item: what errors call it.

    Raises:
        BadRequest: no frames or too many, or one without a source.
    """
    num_frames = len(message.frames)
    if not 1 <= num_frames <= MAX_LISTED_FRAMES:
        raise BadRequest(f"{item} is a list of {num_frames} frames: give 1 to {MAX_LISTED_FRAMES}")
    sources = [(frame.WhichOneof("source"), frame) for frame in message.frames]
    if any(source is None for source, _ in sources):
        raise BadRequest(f"{item} has a frame without a source: give url or data")
    return tuple(
        MediaItem("image", data=frame.data) if source == "data" else MediaItem("image", url=frame.url)
        for source, frame in sources
    )


def add_frames(message: encoder_pb2.Frames | llm_pb2.Frames, frames: Iterable[MediaItem]) -> None:
    """Writes the frames of an item to its message."""
    for frame in frames:
        if frame.data is not None:
            message.frames.add(data=frame.data)
        else:
            message.frames.add(url=frame.url or "")
