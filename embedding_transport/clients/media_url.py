"""Media items from the URLs of OpenAI requests."""

from __future__ import annotations

from collections.abc import Sequence

from vitrine_vlm.embedding_transport.clients.media_options import Layer, media_options
from vitrine_vlm.embedding_transport.wire.data_url import is_data_url, read_data_url
from vitrine_vlm.embedding_transport.wire.frame_list_url import frames_of_url
from vitrine_vlm.errors import BadRequest, MediaError
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaKind, MediaOptions


def media_item(kind: MediaKind, source: str | Sequence[str], layer: Layer) -> MediaItem:
    """Decodes data: URLs here, once: to the encoder go bytes, which are a quarter smaller.

    Args:
        source: the URL, or those of a video's frames.
        layer: the item's options.

    Raises:
        BadRequest: a malformed data: URL, no frames or too many, or options that contradict each other. `param` is the
            place of an option at fault, None where it is the source.
    """
    try:
        if isinstance(source, str):
            frames = frames_of_url(kind, source)
            if frames is None:
                return _item(kind, source, media_options(kind, layer))
            source = [frame.url or "" for frame in frames]
        return _item_of_frames(source, media_options(kind, layer, is_list=True))
    except MediaError as error:
        raise BadRequest(str(error)) from error


def _item(kind: MediaKind, url: str, options: MediaOptions) -> MediaItem:
    if is_data_url(url):
        return MediaItem(kind, data=read_data_url(url), options=options)
    return MediaItem(kind, url=url, options=options)


def _item_of_frames(urls: Sequence[str], options: MediaOptions) -> MediaItem:
    if not 1 <= len(urls) <= MAX_LISTED_FRAMES:
        raise BadRequest(f"a video of {len(urls)} frames: give 1 to {MAX_LISTED_FRAMES}")
    frames: list[MediaItem] = []
    for index, url in enumerate(urls):
        try:
            frames.append(_item("image", url, MediaOptions()))
        except MediaError as error:
            raise BadRequest(f"frame {index}: {error}") from error
    return MediaItem("video", frames=tuple(frames), options=options)
