"""Layouts of media seen before, so that a prompt with them is known before any encoder is asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vitrine_vlm.types import Layout, MediaItem

_MAX_LAYOUTS = 16384


class KnownLayouts:
    """By content, those looked up or seen last. What an address gives may change, so such items are never known."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()

    def all_of(self, keys: Sequence[bytes | None]) -> list[Layout] | None:
        """Layouts of these items; None unless all are known."""
        found: list[Layout] = []
        for key in keys:
            if key is None or key not in self._layouts:
                return None
            self._layouts.move_to_end(key)
            found.append(self._layouts[key])
        return found

    def put(self, key: bytes | None, layout: Layout) -> None:
        if key is not None:
            self._layouts[key] = layout
            self._layouts.move_to_end(key)
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)


def layout_keys(items: Sequence[MediaItem]) -> list[bytes | None]:
    """What decides each item's layout; None for an item without bytes. Takes a while for videos."""
    return [
        None if item.data is None else f"{item.kind}:{item.video_fps}:".encode() + item.content_key for item in items
    ]
