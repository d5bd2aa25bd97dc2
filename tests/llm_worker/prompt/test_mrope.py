"""Positions behind a long video of Qwen2.5-VL, whose time is in the positions of its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitrine_vlm.llm_worker.engine.request import MediaSpan
from vitrine_vlm.llm_worker.families import prompt_config
from vitrine_vlm.llm_worker.prompt.mrope import mrope_positions
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.types import Layout

START, NUM_BEHIND = 15, 20
ROWS, COLUMNS = 12, 22


@pytest.mark.parametrize(
    ("seconds", "first_behind"),
    [
        (4, START + COLUMNS),  # 8 positions of time: the width is larger
        (11, START + COLUMNS),
        (12, START + 23),  # the last frame is at 11 s, 2 positions a second
        (30, START + 59),
        (120, START + 239),
    ],
)
def test_text_goes_on_behind_the_largest_position(qwen2_5_vl_folder: Path, seconds: int, first_behind: int) -> None:
    config = prompt_config(open_checkpoint(str(qwen2_5_vl_folder)))
    assert config.tokens_per_second == 2
    grid_thw = (seconds, ROWS * config.merge_size, COLUMNS * config.merge_size)
    times = tuple(float(second) for second in range(seconds))
    layout = Layout("video", grid_thw, seconds * ROWS * COLUMNS, times, second_per_grid_t=1.0)
    span = MediaSpan(0, START, layout.num_tokens, 0)
    mrope = mrope_positions(span.stop + NUM_BEHIND, [span], [layout], config)
    behind = torch.arange(first_behind, first_behind + NUM_BEHIND)
    assert torch.equal(mrope.positions_3N[:, span.stop :], behind.expand(3, -1))
    assert mrope.next_position == first_behind + NUM_BEHIND
