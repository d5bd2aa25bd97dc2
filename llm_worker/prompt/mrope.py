"""M-RoPE positions of a prompt: text counts up, media tokens lie on a grid of time, row and column.

Source: Qwen2-VL paper (arXiv 2409.12191), section 2.1; transformers 5.23 `get_rope_index` and `get_vision_position_ids`
of models/qwen3_vl and models/qwen2_5_vl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embedding_transport.types import Layout
from llm_worker.engine.request import MediaSpan
from llm_worker.prompt.config import PromptConfig


@dataclass(frozen=True)
class MropePositions:
    """positions_3N: (t, h, w) of every prompt token, int64; next_position: of the first generated one."""

    positions_3N: torch.Tensor
    next_position: int


def mrope_positions(
    num_tokens: int, spans: Sequence[MediaSpan], layouts: Sequence[Layout], config: PromptConfig
) -> MropePositions:
    """
    Args:
        num_tokens: length of the expanded prompt.
        spans: its media spans in order of their start.
    """
    pieces: list[torch.Tensor] = []
    token = position = 0
    for span in spans:
        num_text = span.start - token
        pieces.append(torch.arange(position, position + num_text).expand(3, -1))
        position += num_text
        layout = layouts[span.item_index]
        grid_3N = _grid(span.length, layout, config)
        pieces.append(grid_3N + position)
        # Time does not count: a video advances by its longer side, too.
        position += max(layout.grid_thw[1:]) // config.merge_size
        token = span.start + span.length
    pieces.append(torch.arange(position, position + num_tokens - token).expand(3, -1))
    positions_3N = torch.cat(pieces, dim=1)
    return MropePositions(positions_3N, int(positions_3N.max()) + 1 if num_tokens else 0)


def _grid(num_rows: int, layout: Layout, config: PromptConfig) -> torch.Tensor:
    """Positions of one span from 0 on, [3, num_rows]."""
    _, h, w = layout.grid_thw
    h, w = h // config.merge_size, w // config.merge_size
    times = torch.arange(num_rows // (h * w))
    if layout.kind == "video" and config.tokens_per_second is not None:
        # float32 and truncation as in the source: a rounding here would move whole frames.
        interval = config.tokens_per_second * torch.tensor(layout.second_per_grid_t, dtype=torch.float32)
        times = (times * interval).long()
    return torch.stack(torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1)
