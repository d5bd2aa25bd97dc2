"""Parts of messages that are images or videos, and the media items that they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

from vitrine_vlm.embedding_transport.clients.media_options import (
    ImageOptions,
    Layer,
    RequestOptions,
    VideoOptions,
    layer_of,
    override,
    part_layer,
)
from vitrine_vlm.embedding_transport.clients.media_url import ReadUrl, media_item
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaKind


def _url(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Keeps what was read of a URL already; JSON has none of these."""
    return value if isinstance(value, ReadUrl) else validate(value)


Url = Annotated[str, WrapValidator(_url)]


class ImageUrl(ImageOptions):
    url: Url


class ImagePart(ImageOptions):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(VideoOptions):
    url: Url


class VideoPart(VideoOptions):
    type: Literal["video_url"]
    video_url: VideoUrl


class FramesPart(VideoOptions):
    """A video as a list of its frames' URLs, in the form of qwen-vl-utils and DashScope; a single URL is a video's."""

    type: Literal["video"]
    video: Url | Annotated[list[Url], Field(min_length=1, max_length=MAX_LISTED_FRAMES)]


class InputImage(ImageOptions):
    """An image of `/v1/responses`."""

    type: Literal["input_image"]
    image_url: Url


MediaPart = Annotated[ImagePart | VideoPart | FramesPart, Field(discriminator="type")]
MediaContent: TypeAlias = ImagePart | VideoPart | FramesPart | InputImage


def kind_of(part: MediaContent) -> MediaKind:
    return "image" if isinstance(part, ImagePart | InputImage) else "video"


def media_items(parts: Sequence[tuple[str, MediaContent]], request: RequestOptions) -> tuple[MediaItem, ...]:
    """
    Args:
        parts: each with its place in the request, which errors name.
        request: the options of all of them.

    Raises:
        BadRequest: a malformed data: URL, or options that contradict each other.
    """
    layers = request.layers([kind_of(part) for _, part in parts])
    return tuple(_item(part, path, layer) for (path, part), layer in zip(parts, layers, strict=True))


def _item(part: MediaContent, path: str, request: Layer) -> MediaItem:
    source: str | list[str]
    if isinstance(part, FramesPart):
        key, source, own = "video", part.video, layer_of(part, path)
    elif isinstance(part, VideoPart):
        key, source, own = "video_url.url", part.video_url.url, part_layer(part.video_url, part, "video_url", path)
    elif isinstance(part, InputImage):
        key, source, own = "image_url", part.image_url, layer_of(part, path)
    else:
        key, source, own = "image_url.url", part.image_url.url, part_layer(part.image_url, part, "image_url", path)
    try:
        return media_item(kind_of(part), source, override(request, own))
    except BadRequest as error:
        if error.param is not None:
            raise
        raise BadRequest(f"{path}.{key}: {error}", f"{path}.{key}") from error
