"""Turns the items of /encode into media items. An option that changes rows is applied, or its item is refused."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import PurePosixPath

from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.encoder_service.sglang.bodies import EncodeBody, ItemBody
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.byte_budget import Reserve
from vitrine_vlm.service_runtime.shown_urls import shown_url
from vitrine_vlm.types import MediaItem, MediaKind, MediaOptions

_KINDS: dict[str, MediaKind] = {"IMAGE": "image", "VIDEO": "video"}
_URL = re.compile(r"(https?|data|file):", re.IGNORECASE)
# The first characters suffice to tell base64 from a path or a URL of another scheme; the loader checks all of it.
_BASE64 = re.compile(r"[A-Za-z0-9+/]{1,64}={0,2}$")
_NUM_CHECKED = 64
_MAX_PARSED = 8192
# Keys of a content part that say nothing of the pixels.
_ENVELOPE = {"type", "modality"}


async def media_items(body: EncodeBody, loader: MediaLoader, reserve: Reserve) -> list[MediaItem]:
    """Returns the items of a part, in their order.

    Args:
        loader: loads at once the items whose content is to be compared with a hash.
        reserve: called with the number of bytes that are loaded so.

    Raises:
        BadRequest: audio, an option that this encoder cannot apply, or a content that does not fit its hash.
        MediaError: an item with a hash cannot be loaded.
    """
    kind = _KINDS.get(body.modality)
    if kind is None:
        raise BadRequest(f"modality is {body.modality}: this encoder takes IMAGE and VIDEO")
    items = []
    for index, each in enumerate(body.mm_items):
        if isinstance(each, str):
            items.append(MediaItem(kind, url=_url(index, each)))
            continue
        item = _item_with_options(index, kind, each)
        items.append(await _verified(index, item, each.content_hash, loader, reserve) if each.content_hash else item)
    return items


def _item_with_options(index: int, kind: MediaKind, body: ItemBody) -> MediaItem:
    extra = body.model_extra or {}
    unknown = sorted(key for key, value in extra.items() if key not in _ENVELOPE and value not in (None, {}))
    if unknown:
        raise BadRequest(f"item {index} has {', '.join(unknown)[:200]}, which this encoder cannot apply: leave it out")
    if kind == "image" and body.fps is not None:
        raise BadRequest(f"item {index} is an image and has fps {body.fps:g}: give fps for videos only")
    # `detail` changes nothing: SGLang prepares pictures for these families alike, whatever it is.
    return MediaItem(kind, url=_url(index, body.url), options=MediaOptions(fps=body.fps))


def _url(index: int, source: str) -> str:
    """Returns a URL for each form that SGLang's own encoder takes: a URL, an absolute path, bare base64."""
    if _URL.match(source):
        return source
    if source.startswith("/"):
        return PurePosixPath(source).as_uri()
    if _BASE64.match(source[:_NUM_CHECKED]):
        return f"data:;base64,{source}"
    shown = shown_url(source[:_MAX_PARSED])
    raise BadRequest(f"item {index} is {shown}: give an http:, https:, data: or file: URL, an absolute path or base64")


async def _verified(index: int, item: MediaItem, content_hash: str, loader: MediaLoader, reserve: Reserve) -> MediaItem:
    """Loads an item and compares the SHA-256 of its file with `content_hash`, "sha256:" and hexadecimal digits."""
    data = await loader.load(item, reserve)
    found = f"sha256:{await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())}"
    if found != content_hash.lower():
        raise BadRequest(f"item {index} has content_hash {content_hash}, but its file has {found}")
    return MediaItem(item.kind, data=data, options=item.options)
