"""The axis that each frequency rotates with, for the sections of the released models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.rotary import axis_of_frequency, rotary_at
from vitrine_vlm.model_loading.checkpoint import open_checkpoint


def config(folder: Path, section: tuple[int, int, int], interleaved: bool) -> TextConfig:
    small = text_config(open_checkpoint(str(folder)))
    return replace(small, head_dim=128, mrope_section=section, mrope_interleaved=interleaved, rope_theta=1e6)


def test_axes_in_turn_as_qwen3_vl_has_them(qwen3_vl_folder: Path) -> None:
    axis = axis_of_frequency(config(qwen3_vl_folder, (24, 20, 20), True)).tolist()
    assert axis == [0, 1, 2] * 20 + [0] * 4


def test_axes_in_blocks_as_qwen2_5_vl_has_them(qwen2_5_vl_folder: Path) -> None:
    axis = axis_of_frequency(config(qwen2_5_vl_folder, (16, 24, 24), False)).tolist()
    assert axis == [0] * 16 + [1] * 24 + [2] * 24


def test_each_axis_rotates_its_own_frequencies(qwen3_vl_folder: Path) -> None:
    cfg = config(qwen3_vl_folder, (24, 20, 20), True)
    axis = axis_of_frequency(cfg).repeat(2)
    for moved in range(3):
        positions_3T = torch.zeros(3, 1, dtype=torch.int64)
        positions_3T[moved] = 5
        sin_D = rotary_at(positions_3T, cfg, torch.float32).sin_T1D[0, 0]
        assert torch.equal(sin_D != 0, axis == moved)
    frequencies = 1e6 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    turned = rotary_at(torch.full((3, 1), 100_000), cfg, torch.float32).cos_T1D[0, 0, :64]
    assert torch.allclose(turned.double(), (100_000 * frequencies).cos(), atol=2e-2)
