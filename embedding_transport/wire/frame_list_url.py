"""Videos that are a list of pictures, in one URL.

The format is vLLM's (vllm/multimodal/media/video.py, `load_base64`): `data:video/jpeg;base64,` and the frames in
base64, with commas between them.
"""

from __future__ import annotations

from vitrine_vlm.embedding_transport.wire.data_url import DataUrl, is_data_url
from vitrine_vlm.errors import MediaTooLarge
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
    parts = DataUrl.parse(url)
    if parts.media_type != _TYPE or not parts.is_base64:
        return None
    num_frames = url.count(",", parts.begin, parts.end) + 1
    if num_frames > MAX_LISTED_FRAMES:
        raise MediaTooLarge(f"a list of {num_frames} frames: at most {MAX_LISTED_FRAMES} are accepted, send fewer")
    return tuple(MediaItem("image", url=f"data:image/jpeg;base64,{frame}") for frame in parts.payload.split(","))
