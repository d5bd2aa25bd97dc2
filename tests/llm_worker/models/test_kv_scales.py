"""Scales of keys and values are read from checkpoints that have them, under each of the names in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.kv_slots import UNSCALED, KvScales
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint

LAYERS = "model.language_model.layers"


def scales_of(folder: Path, stored: dict[str, torch.Tensor]) -> list[KvScales]:
    """The scales of each layer, of a checkpoint that has these tensors, too."""
    path = save_random_checkpoint(folder, "qwen3_vl") / "model.safetensors"
    save_file(load_file(path) | stored, path)
    decoder = build_decoder(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32)
    return [layer.self_attn.kv_scales for layer in decoder.layers]  # type: ignore[union-attr, misc]


def test_both_names_are_read(tmp_path: Path) -> None:
    stored = {
        f"{LAYERS}.0.self_attn.k_scale": torch.tensor([0.25]),
        f"{LAYERS}.0.self_attn.v_scale": torch.tensor([2.0], dtype=torch.bfloat16),
        f"{LAYERS}.1.self_attn.v_proj.v_scale": torch.tensor(3.0),
    }
    first, second, *others = scales_of(tmp_path, stored)
    assert (first, second) == (KvScales(0.25, 2.0), KvScales(1.0, 3.0))
    assert set(others) <= {UNSCALED}


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (torch.ones(2), r"shape \(2,\)"),
        (torch.tensor([0.0]), "is 0.0"),
        (torch.tensor([-1.0]), "is -1.0"),
        (torch.tensor([float("nan")]), "is nan"),
    ],
)
def test_other_scales_are_refused(tmp_path: Path, scale: torch.Tensor, says: str) -> None:
    name = f"{LAYERS}.1.self_attn.k_scale"
    with pytest.raises(CheckpointError, match=rf"{name} (has )?{says}"):
        scales_of(tmp_path, {name: scale})
