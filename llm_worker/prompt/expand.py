"""Expands the placeholders of a prompt by the items' layouts.

Source: transformers 5.23 `replace_video_token` of the processors that the families name, and
`ProcessorMixin.get_text_with_replacements`, which leaves the text around a placeholder as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.llm_worker.prompt.mrope import mrope_positions
from vitrine_vlm.llm_worker.prompt.placeholders import PlaceholderPlan, match_expanded, span_lengths
from vitrine_vlm.types import Layout, MediaKind

EncodeText = Callable[[str], list[int]]


def expand_prompt(
    plan: PlaceholderPlan, layouts: Sequence[Layout], config: PromptConfig, encode_text: EncodeText | None
) -> ExpandedPrompt:
    """Returns the whole prompt.

    Args:
        layouts: of the request's items, in order.
        encode_text: tokenizes timestamps that are text; None where there is no tokenizer.

    Raises:
        PlaceholderMismatch: the placeholders are expanded already, but not as the layouts demand.
        BadRequest: a timestamp has to be tokenized and there is no tokenizer.
    """
    if plan.expanded:
        token_ids, spans = plan.token_ids, match_expanded(plan, layouts, config)
    else:
        token_ids, spans = _expand_each(plan, layouts, config, encode_text)
    mrope = mrope_positions(len(token_ids), spans, layouts, config)
    content_hashes = tuple(layout.content_hash for layout in layouts)
    return ExpandedPrompt(token_ids, mrope.positions_3N, mrope.next_position, tuple(spans), content_hashes)


def _expand_each(
    plan: PlaceholderPlan, layouts: Sequence[Layout], config: PromptConfig, encode_text: EncodeText | None
) -> tuple[list[int], list[MediaSpan]]:
    token_ids: list[int] = []
    spans: list[MediaSpan] = []
    done = 0
    for position, item_index in _placeholders(plan, layouts):
        token_ids += plan.token_ids[done:position]
        done = position + 1
        layout = layouts[item_index]
        lengths = span_lengths(layout, config)
        timestamped = layout.kind == "video" and config.timestamped_videos
        first_row = 0
        for frame, length in enumerate(lengths):
            if timestamped:
                token_ids += _timestamp(layout.timestamps_s[frame], encode_text)
                token_ids.append(config.vision_start_token_id)
            spans.append(MediaSpan(item_index, len(token_ids), length, first_row))
            token_ids += [config.placeholder_ids[layout.kind]] * length
            if timestamped:
                token_ids.append(config.vision_end_token_id)
            first_row += length
    return token_ids + plan.token_ids[done:], spans


def _placeholders(plan: PlaceholderPlan, layouts: Sequence[Layout]) -> list[tuple[int, int]]:
    """Position and item of every placeholder, in order of position."""
    items: dict[MediaKind, list[int]] = {
        kind: [index for index, layout in enumerate(layouts) if layout.kind == kind] for kind in plan.positions
    }
    return sorted(
        (int(position), item)
        for kind, where in plan.positions.items()
        for position, item in zip(where, items[kind], strict=True)
    )


def _timestamp(seconds: float, encode_text: EncodeText | None) -> list[int]:
    if encode_text is None:
        raise BadRequest(
            "a video placeholder needs its timestamps tokenized and this worker runs without a tokenizer: "
            "send the video's placeholders expanded"
        )
    return encode_text(f"<{seconds:.1f} seconds>")
