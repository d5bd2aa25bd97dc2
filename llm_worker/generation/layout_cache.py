"""Layouts of media seen before, so that a prompt with them is known without asking an encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import Layout, MediaItem

_MAX_LAYOUTS = 16384


class LayoutCache:
    """Layouts by content, the least recently used evicted first. Items given by URL are not cached: they may change."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()

    def get_all(self, keys: Sequence[bytes | None]) -> list[Layout] | None:
        """Returns the layouts of these items; None unless all are cached."""
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


def layout_keys(items: Sequence[MediaItem], scope: CacheScope) -> list[bytes | None]:
    """Returns the keys of these items: all that their layouts depend on; None for an item that is not all bytes.

    The scope is part of them, too: a prompt whose layouts are known takes another, faster way, which shows in its time.

    Hashes the items' bytes, which takes a while for videos.
    """
    digest = scope.digest()
    return [
        digest + f"{item.kind}:{item.options}:".encode() + item.content_key if _is_bytes(item) else None
        for item in items
    ]


def _is_bytes(item: MediaItem) -> bool:
    if item.frames is not None:
        return all(frame.data is not None for frame in item.frames)
    return item.data is not None
