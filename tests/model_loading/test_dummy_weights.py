"""Dummy weights: what they are drawn from, that they are the same each time, and that no files are needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vitrine_vlm.encoder_service.families import build_tower
from vitrine_vlm.encoder_service.models.weights import VisualWeights
from vitrine_vlm.encoder_service.models.weights import stored_dtype as stored_visual_dtype
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.weights import stored_dtype as stored_language_dtype
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.model_loading.dummy_weights import configured_dtype, draw_dummy_weights
from vitrine_vlm.sample_models.random_checkpoint import save_weightless_checkpoint, small_config

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 500)
        self.head.weight = self.embed.weight


def drawn(folder: Path, config: dict[str, object]) -> tuple[Tied, list[tuple[int, int]]]:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"} | config))
    with torch.device("meta"):
        model = Tied()
    progress: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(str(folder), load_format="dummy")
    draw_dummy_weights(model, checkpoint, CPU, torch.bfloat16, lambda done, total: progress.append((done, total)))
    return model, progress


@pytest.mark.parametrize(
    ("config", "std"),
    [({}, 0.02), ({"initializer_range": 0.1}, 0.1), ({"text_config": {"initializer_range": 0.05}}, 0.05)],
)
def test_what_is_drawn(tmp_path: Path, config: dict[str, object], std: float, caplog: pytest.LogCaptureFixture) -> None:
    model, progress = drawn(tmp_path, config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.embed.weight.float().std().item() == pytest.approx(std, rel=0.05)
    assert model.embed.weight.float().mean().item() == pytest.approx(0.0, abs=std / 20)
    assert torch.equal(model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    assert not model.norm.bias.any() and not model.head.bias.any()
    assert model.head.weight is model.embed.weight
    assert progress == [(done, 4) for done in range(1, 5)]
    assert "answers mean nothing" in caplog.text


def test_each_start_draws_the_same(tmp_path: Path) -> None:
    first, _ = drawn(tmp_path, {})
    torch.randn(3)  # another use of torch's own generator changes nothing
    again, _ = drawn(tmp_path, {})
    assert torch.equal(first.embed.weight, again.embed.weight)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_both_halves_are_complete_without_files(tmp_path: Path, family: str, request: pytest.FixtureRequest) -> None:
    real = open_checkpoint(str(request.getfixturevalue(f"{family}_folder")))
    folder = save_weightless_checkpoint(tmp_path, family, small_config(family))  # type: ignore[arg-type]
    assert not list(folder.glob("*.safetensors"))
    dummy = open_checkpoint(str(folder), load_format="dummy")
    for build in (build_tower, build_decoder):
        expected = build(real, CPU, torch.float32).state_dict()
        weights = build(dummy, CPU, torch.float32).state_dict()
        assert {name: each.shape for name, each in weights.items()} == {n: each.shape for n, each in expected.items()}
        assert all(each.device == CPU and each.isfinite().all() for each in weights.values())


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_omni_moe"])
def test_a_tower_alone_is_complete_without_files(tmp_path: Path, family: str, request: pytest.FixtureRequest) -> None:
    real = open_checkpoint(str(request.getfixturevalue(f"{family}_folder")))
    folder = save_weightless_checkpoint(tmp_path, family, small_config(family))  # type: ignore[arg-type]
    weights = build_tower(open_checkpoint(str(folder), load_format="dummy"), CPU, torch.float32).state_dict()
    expected = build_tower(real, CPU, torch.float32).state_dict()
    assert {name: each.shape for name, each in weights.items()} == {n: each.shape for n, each in expected.items()}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"text_config": {"dtype": "float32"}}, torch.float32),
    ],
)
def test_dtype_is_what_the_config_says(tmp_path: Path, config: dict[str, object], dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"} | config))
    checkpoint = open_checkpoint(str(tmp_path), load_format="dummy")
    assert stored_visual_dtype(checkpoint, VisualWeights()) == stored_language_dtype(checkpoint) == dtype


def test_a_dtype_that_is_not_served_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "dtype": "int4"}')
    with pytest.raises(CheckpointError, match="'int4'"):
        configured_dtype(open_checkpoint(str(tmp_path), load_format="dummy"))
