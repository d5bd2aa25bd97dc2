"""The body of a request as JSON's values; in those of a large one data: URLs of media are read, and left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from pydantic_core import from_json

from vitrine_vlm.embedding_transport.clients.media_json import item_from_json, item_to_json
from vitrine_vlm.embedding_transport.clients.media_url import ReadUrl, item_of_url
from vitrine_vlm.embedding_transport.wire.data_url import is_data_url
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.body_process import Keep, Kept
from vitrine_vlm.service_runtime.json_limits import check_json, num_values
from vitrine_vlm.types import MediaKind

# So many values, or more, are many, see `request_parsing`.
MANY_VALUES = 10_000
# Shorter ones stay: it takes as long to write where they are.
_LEAST_URL_CHARS = 64 * 1024
# Lists of content parts, or of objects that have one: of chats, of responses, of completions.
_PARTS, _HOLDERS = "media", {"messages": ("content",), "input": ("content", "output")}
_URL_KEYS: dict[str, MediaKind] = {"image_url": "image", "video_url": "video", "video": "video"}

Path: TypeAlias = list[str | int]


def json_object(body: bytes) -> dict[str, Any]:
    """
    Raises:
        BadRequest: the body is no JSON object, or too large a one.
    """
    check_json(body)
    try:
        values = from_json(body)
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest(f"the body is no JSON object but a {type(values).__name__}")
    return values


def read_media(body: bytes, keep: Keep) -> dict[str, Any]:
    """What is found in a large body: where its values are kept, null for long data: URLs of media, and these items.

    Beside them stand the length and the number of values of what is left, about.

    Raises:
        BadRequest: see `json_object`. What is wrong with a URL is an error of its item.
    """
    values, nbytes = json_object(body), len(body)
    items: list[tuple[Path, dict[str, Any]]] = []
    for path, kind, url in list(_urls(values)):
        if isinstance(url, str) and len(url) >= _LEAST_URL_CHARS and is_data_url(url):
            _holder(values, path)[path[-1]] = None
            nbytes -= len(url)
            items.append((path, _item(kind, url, keep)))
    # Beside the rest, in which they would be nested more deeply than a parser takes.
    place = keep(json.dumps(values, ensure_ascii=False).encode())
    return {"values": place, "items": items, "nbytes": nbytes, "num_values": num_values(body, MANY_VALUES)}


def with_media(found: dict[str, Any], kept: Kept) -> dict[str, Any]:
    """The body's values with a `ReadUrl` for each item that was found."""
    values: dict[str, Any] = from_json(kept(*found["values"]))
    for path, item in found["items"]:
        read = BadRequest(item["error"]) if "error" in item else item_from_json(item, kept)
        _holder(values, path)[path[-1]] = ReadUrl(read)
    return values


def _item(kind: MediaKind, url: str, keep: Keep) -> dict[str, Any]:
    try:
        return item_to_json(item_of_url(kind, url), keep)
    except BadRequest as error:
        return {"error": str(error)}


def _holder(values: Any, path: Path) -> Any:
    """The object or list in which the path's last name or index is."""
    for each in path[:-1]:
        values = values[each]
    return values


def _urls(values: dict[str, Any]) -> Iterator[tuple[Path, MediaKind, object]]:
    """What stands where URLs of media may be; the body's fields may have any types."""
    for path, part in _parts(values):
        for key, kind in _URL_KEYS.items():
            given = part.get(key)
            if isinstance(given, dict):
                yield [*path, key, "url"], kind, given.get("url")
            elif isinstance(given, list):
                yield from (([*path, key, index], "image", url) for index, url in enumerate(given))
            else:
                yield [*path, key], kind, given


def _parts(values: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    yield from _objects(values, [_PARTS])
    for name, keys in _HOLDERS.items():
        for path, holder in _objects(values, [name]):
            for key in keys:
                for inner, part in _objects(holder, [key]):
                    yield [*path, *inner], part


def _objects(holder: dict[str, Any], path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The objects in a list, if it is one."""
    values = holder.get(str(path[-1]))
    for index, value in enumerate(values if isinstance(values, list) else []):
        if isinstance(value, dict):
            yield [*path, index], value
