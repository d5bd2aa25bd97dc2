"""Parts of messages that are images or videos, and the media items that they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from vitrine_vlm.embedding_transport.clients.media_url import item_from_url
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.json_types import Number, RequestObject
from vitrine_vlm.types import MediaItem, MediaKind


class MediaUrl(RequestObject):
    url: str


class ImagePart(RequestObject):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoUrl(MediaUrl):
    """fps: frames sampled per second, an extension of OpenAI's fields; the checkpoint's own rate where left out."""

    fps: Number | None = Field(None, gt=0)


class VideoPart(RequestObject):
    type: Literal["video_url"]
    video_url: VideoUrl


MediaPart = Annotated[ImagePart | VideoPart, Field(discriminator="type")]


def media_items(parts: Sequence[tuple[str, ImagePart | VideoPart]]) -> tuple[MediaItem, ...]:
    """
    Args:
        parts: each with its place in the request, which errors name.

    Raises:
        BadRequest: a malformed data: URL.
    """
    return tuple(_items(parts))


def _items(parts: Sequence[tuple[str, ImagePart | VideoPart]]) -> Iterator[MediaItem]:
    for path, part in parts:
        if isinstance(part, VideoPart):
            yield _item("video", part.video_url.url, part.video_url.fps, f"{path}.video_url.url")
        else:
            yield _item("image", part.image_url.url, None, f"{path}.image_url.url")


def _item(kind: MediaKind, url: str, video_fps: float | None, path: str) -> MediaItem:
    """path: where the URL stands in the request."""
    try:
        return item_from_url(kind, url, video_fps)
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}", path) from error
