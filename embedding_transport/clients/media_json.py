"""Media items in JSON, with their bytes beside it: from the process that reads large bodies to its service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vitrine_vlm.service_runtime.body_process import Keep, Kept
from vitrine_vlm.types import MediaItem, MediaOptions


def item_to_json(item: MediaItem, keep: Keep) -> dict[str, Any]:
    """An item of a URL, of bytes or of frames."""
    fields: dict[str, Any] = {"kind": item.kind, "options": asdict(item.options)}
    if item.data is not None:
        return fields | {"data": keep(item.data)}
    if item.frames is not None:
        return fields | {"frames": [item_to_json(frame, keep) for frame in item.frames]}
    return fields | {"url": item.url}


def item_from_json(fields: Mapping[str, Any], kept: Kept) -> MediaItem:
    """The item again."""
    kind, options = fields["kind"], MediaOptions(**fields["options"])
    if "data" in fields:
        return MediaItem(kind, data=kept(*fields["data"]), options=options)
    if "frames" in fields:
        frames = tuple(item_from_json(frame, kept) for frame in fields["frames"])
        return MediaItem(kind, frames=frames, options=options)
    return MediaItem(kind, url=fields["url"], options=options)
