"""M-RoPE positions of a prompt: text counts up, media tokens lie on a grid of time, row and column.

Source: arXiv 2409.12191, section 2.1: a modality begins at the largest position in front of it plus one. The positions
within media are those of `get_vision_position_ids` of transformers 5.23's models that the families name. Its
`get_rope_index` goes on behind a video by height and width alone, which is inside the time of a long video;
transformers up to 5.2 and vLLM follow the paper, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vitrine_vlm.llm_worker.engine.request import MediaSpan
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.types import Layout


@dataclass(frozen=True)
class MropePositions:
    """positions_3N: (t, h, w) of every prompt token, int64; next_position: of the first generated one."""

    positions_3N: torch.Tensor
    next_position: int


def mrope_positions(
    num_tokens: int, spans: Sequence[MediaSpan], layouts: Sequence[Layout], config: PromptConfig
) -> MropePositions:
    """Computes the positions of a prompt.

    Args:
        num_tokens: length of the expanded prompt.
        spans: its media spans in order of their start.
    """
    # NumPy, as torch takes several times as long for so few numbers.
    positions_3N = np.empty((3, num_tokens), dtype=np.int64)
    token = position = 0
    for span in spans:
        num_text = span.start - token
        positions_3N[:, token : span.start] = np.arange(position, position + num_text)
        position += num_text
        layout = layouts[span.item_index]
        _, h, w = (size // config.merge_size for size in layout.grid_thw)
        times_THW, rows_THW, columns_THW = positions_3N[:, span.start : span.stop].reshape(3, -1, h, w)
        times = _times(len(times_THW), layout, config)
        times_THW[:] = position + times[:, None, None]
        rows_THW[:] = position + np.arange(h)[:, None]
        columns_THW[:] = position + np.arange(w)
        position += max(h, w, int(times[-1]) + 1)
        token = span.stop
    positions_3N[:, token:] = np.arange(position, position + num_tokens - token)
    return MropePositions(torch.from_numpy(positions_3N), int(positions_3N.max()) + 1 if num_tokens else 0)


def _times(num_times: int, layout: Layout, config: PromptConfig) -> npt.NDArray[np.int64]:
    """Time positions of a span's temporal patches, from 0 on, [num_times]."""
    times = np.arange(num_times)
    if layout.kind == "video" and config.tokens_per_second is not None:
        # float32 and truncation as in the source: rounding would give whole frames other positions.
        interval = np.float32(config.tokens_per_second) * np.float32(layout.second_per_grid_t)
        times = (times.astype(np.float32) * interval).astype(np.int64)
    return times
