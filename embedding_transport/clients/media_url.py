"""Media items from the URLs of OpenAI requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitrine_vlm.embedding_transport.clients.media_options import Layer, media_options
from vitrine_vlm.embedding_transport.wire.data_url import is_data_url, read_data_url
from vitrine_vlm.embedding_transport.wire.frame_list_url import frames_of_url
from vitrine_vlm.errors import BadRequest, MediaError
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaKind


class ReadUrl(str):
    """A data: URL that another process has read; as a string it is an empty one.

    Args:
        read: what it has found, or why it has found nothing.
    """

    def __new__(cls, read: MediaItem | BadRequest) -> ReadUrl:
        url = super().__new__(cls, "data:,")
        url._read = read
        return url

    _read: MediaItem | BadRequest

    @property
    def item(self) -> MediaItem:
        """
        Raises:
            BadRequest: see `item_of_url`.
        """
        if isinstance(self._read, BadRequest):
            raise self._read
        return self._read


def media_item(kind: MediaKind, source: str | Sequence[str], layer: Layer) -> MediaItem:
    """
    Args:
        source: the URL, or those of a video's frames.
        layer: the item's options.

    Raises:
        BadRequest: a malformed data: URL, no frames or too many, or options that contradict each other. `param` is the
            place of an option at fault, None where it is the source.
    """
    item = item_of_url(kind, source) if isinstance(source, str) else _item_of_frames(source)
    return replace(item, options=media_options(kind, layer, is_list=item.frames is not None))


def item_of_url(kind: MediaKind, url: str) -> MediaItem:
    """The item at a URL, without options.

    data: URLs are decoded here, once: to the encoder go bytes, which are a quarter smaller.

    Raises:
        BadRequest: a malformed data: URL, or one with too many frames.
    """
    if isinstance(url, ReadUrl):
        return url.item
    if not is_data_url(url):
        return MediaItem(kind, url=url)
    try:
        frames = frames_of_url(kind, url)
        if frames is None:
            return MediaItem(kind, data=read_data_url(url))
    except MediaError as error:
        raise BadRequest(str(error)) from error
    return _item_of_frames([frame.url or "" for frame in frames])


def _item_of_frames(urls: Sequence[str]) -> MediaItem:
    if not 1 <= len(urls) <= MAX_LISTED_FRAMES:
        raise BadRequest(f"a video of {len(urls)} frames: give 1 to {MAX_LISTED_FRAMES}")
    frames: list[MediaItem] = []
    for index, url in enumerate(urls):
        try:
            frames.append(item_of_url("image", url))
        except BadRequest as error:
            raise BadRequest(f"frame {index}: {error}") from error
    return MediaItem("video", frames=tuple(frames))
