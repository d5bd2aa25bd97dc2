"""Matches the placeholder tokens of a prompt with media items.

Usually each item has exactly one placeholder, and the i-th placeholder of a kind is the i-th item of that kind, which
is known before anything is loaded. Otherwise the prompt's placeholders are expanded already, and they are matched with
the items' layouts once these are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vitrine_vlm.errors import PlaceholderMismatch
from vitrine_vlm.llm_worker.engine.request import MediaSpan
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.types import Layout, MediaKind

Positions = dict[MediaKind, npt.NDArray[np.intp]]


@dataclass(frozen=True)
class PlaceholderPlan:
    """The placeholders of a prompt.

    positions: of each kind's placeholder tokens. expanded: there is one for every embedding, not one for every item.
    """

    token_ids: list[int]
    positions: Positions
    expanded: bool

    @property
    def num_prefix_tokens(self) -> int:
        """Number of text tokens in front of the first placeholder."""
        return min((int(each[0]) for each in self.positions.values() if len(each)), default=len(self.token_ids))


def plan_placeholders(token_ids: list[int], kinds: Sequence[MediaKind], config: PromptConfig) -> PlaceholderPlan:
    """Finds the placeholders of a prompt.

    Args:
        kinds: of the request's items, in order.

    Raises:
        PlaceholderMismatch: fewer placeholders of a kind than items, or placeholders without any item of their kind.
    """
    ids = np.asarray(token_ids)
    positions: Positions = {kind: np.flatnonzero(ids == each) for kind, each in config.placeholder_ids.items()}
    expanded = False
    for kind, where in positions.items():
        num_items = kinds.count(kind)
        if len(where) < num_items or (len(where) and not num_items):
            raise PlaceholderMismatch(
                f"the prompt has {len(where)} {kind} placeholders (token {config.placeholder_ids[kind]}), the request "
                f"has {num_items} {kind} items: send one placeholder for each item"
            )
        expanded |= len(where) > num_items
    return PlaceholderPlan(token_ids, positions, expanded)


def span_lengths(layout: Layout, config: PromptConfig) -> list[int]:
    """Lengths of an item's runs of placeholders: one run, but one a temporal patch for timestamped videos."""
    if layout.kind == "image" or not config.timestamped_videos:
        return [layout.num_tokens]
    num_frames = layout.grid_thw[0]
    return [layout.num_tokens // num_frames] * num_frames


def match_expanded(plan: PlaceholderPlan, layouts: Sequence[Layout], config: PromptConfig) -> list[MediaSpan]:
    """Returns the spans of a prompt whose placeholders are expanded, in order of their start.

    Raises:
        PlaceholderMismatch: the runs of placeholders have other lengths than the layouts demand.
    """
    spans: list[MediaSpan] = []
    for kind, where in plan.positions.items():
        num_matched = 0
        for item_index, layout in enumerate(layouts):
            if layout.kind != kind:
                continue
            first_row = 0
            for length in span_lengths(layout, config):
                run = where[num_matched : num_matched + length]
                if len(run) < length or run[-1] - run[0] != length - 1:
                    raise PlaceholderMismatch(_mismatch(kind, len(where), layouts, config))
                spans.append(MediaSpan(item_index, int(run[0]), length, first_row))
                num_matched, first_row = num_matched + length, first_row + length
        if num_matched != len(where):
            raise PlaceholderMismatch(_mismatch(kind, len(where), layouts, config))
    return sorted(spans, key=lambda span: span.start)


def _mismatch(kind: MediaKind, num_found: int, layouts: Sequence[Layout], config: PromptConfig) -> str:
    needed = [span_lengths(layout, config) for layout in layouts if layout.kind == kind]
    return (
        f"the prompt has {num_found} {kind} placeholders, the {kind} items need runs of {needed}: send one placeholder "
        "for each item, or all of them expanded to these runs"
    )
