"""Checkpoints in FP8: both layouts, read whole and in parts, against a dequantization of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fp8_reference import dequantized_tensors
from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.model_loading.checkpoint import CheckpointError, TensorPart, open_checkpoint
from vitrine_vlm.model_loading.fp8_weights import Fp8Format, fp8_format, read_weights
from vitrine_vlm.sample_models.random_checkpoint import Fp8Layout, save_fp8_checkpoint

DOWN = "model.language_model.layers.1.mlp.down_proj.weight"
LAYOUTS: tuple[Fp8Layout, ...] = ("block", "channel")


def e4m3(bits: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values of e4m3's bytes, by its definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    exponent, mantissa = (bits >> 3 & 15).astype(int), (bits & 7) / 8
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    return np.where(bits >> 7, -value, value)


@pytest.fixture(params=LAYOUTS)
def fp8_folder(request: pytest.FixtureRequest, tmp_path: Path, qwen3_vl_folder: Path) -> Path:
    return save_fp8_checkpoint(qwen3_vl_folder, tmp_path / "fp8", request.param)


def read(folder: Path, name: str, part: TensorPart | None = None) -> Fp8Weight:
    ((_, weight),) = read_weights(open_checkpoint(str(folder)), [name], choose_part=lambda *_: part)
    assert isinstance(weight, Fp8Weight)
    return weight


def test_weights_are_values_times_scales(fp8_folder: Path, qwen3_vl_folder: Path) -> None:
    weight = read(fp8_folder, DOWN)
    stored = load_file(fp8_folder / "model.safetensors")[DOWN]
    scale = weight.scale.double().numpy()
    by_hand = e4m3(stored.view(torch.uint8).numpy())
    for row in range(by_hand.shape[0]):
        for column in range(by_hand.shape[1]):
            by_hand[row, column] *= scale[row // weight.block[0], column // weight.block[1]]
    torch.testing.assert_close(weight.dequantized(torch.float32).double(), torch.from_numpy(by_hand), rtol=1e-7, atol=0)
    original = load_file(qwen3_vl_folder / "model.safetensors")[DOWN]
    error = (weight.dequantized(torch.float32) - original).norm() / original.norm()
    assert 0.01 < error < 0.04, "e4m3 rounds by 2.6 % on average"


def test_the_reference_of_the_other_tests_agrees(fp8_folder: Path) -> None:
    assert torch.equal(read(fp8_folder, DOWN).dequantized(torch.float32), dequantized_tensors(fp8_folder)[DOWN])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_parts(layout: Fp8Layout, dim: int, tmp_path: Path, qwen3_vl_folder: Path) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path, layout, block=(16, 32))
    whole = read(folder, DOWN).dequantized(torch.float32)
    ranges = (slice(32, 64), slice(64, whole.shape[dim]))
    part = read(folder, DOWN, TensorPart(dim, ranges)).dequantized(torch.float32)
    assert torch.equal(part, whole.narrow(dim, 32, whole.shape[dim] - 32))


def test_a_cut_inside_a_block_is_refused(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path, "block", block=(128, 128))
    with pytest.raises(CheckpointError, match=r"inside its blocks of 128.*lower --tp"):
        read(folder, DOWN, TensorPart(1, (slice(0, 96),)))


def test_one_scale_for_a_whole_weight(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path, "channel")
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN + "_scale"] = torch.tensor([0.5])
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(read(folder, DOWN).dequantized(torch.float32), tensors[DOWN].float() * 0.5)


def stated(config: dict[str, Any], tmp_path: Path) -> Fp8Format | None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "quantization_config": config}))
    return fp8_format(open_checkpoint(str(tmp_path)))


def test_config_spelled_as_qwen3_vl_8b_fp8(tmp_path: Path) -> None:
    form = stated(
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", "model.visual.merger.linear_fc1", "model.visual.blocks.0.mlp"],
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        tmp_path,
    )
    assert form is not None and (form.suffix, form.block) == ("_scale_inv", (128, 128))
    assert form.ignores("lm_head") and form.ignores("model.visual.blocks.0.mlp.linear_fc2")
    assert not form.ignores("model.visual.blocks.0.mlp2") and not form.ignores("model.language_model.layers.0.mlp")


def compressed(weights: dict[str, Any], activations: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


FLOAT = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"}
TOKEN = {"type": "float", "num_bits": 8, "dynamic": True, "strategy": "token"}


def test_config_spelled_as_llm_compressors(tmp_path: Path) -> None:
    form = stated(compressed(FLOAT, TOKEN, ignore=["re:.*visual.*", "lm_head"]), tmp_path)
    assert form is not None and (form.suffix, form.block) == ("_scale", None)
    assert form.ignores("model.visual.merger") and not form.ignores("model.language_model.layers.0.mlp.up_proj")
    blocks = stated(compressed(FLOAT | {"strategy": "block", "block_structure": [128, 128]}, TOKEN), tmp_path)
    assert blocks is not None and blocks.block == (128, 128)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "'static'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"\[128\]"),
        (compressed(FLOAT | {"type": "int", "num_bits": 4}, None), "4-bit weights of type 'int'"),
        (compressed(FLOAT, TOKEN | {"dynamic": False}), "static activations"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 block sizes"),
    ],
)
def test_other_quantizations_are_named(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        stated(config, tmp_path)


def without_config(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]


def without_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[DOWN + "_scale_inv"]


def with_another_scale(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[DOWN + "_scale_inv"] = torch.ones(3, 3)


def with_a_scale_of_the_other_format(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[DOWN + "_scale"] = tensors.pop(DOWN + "_scale_inv")


def in_bfloat16(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[DOWN] = tensors[DOWN].bfloat16()


def ignored(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["modules_to_not_convert"].append("model.language_model.layers.1")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_config, "no quantization_config"),
        (without_scale, "float8_e4m3fn without a scale"),
        (with_another_scale, r"shape \(3, 3\).*\(1, 2\)"),
        (with_a_scale_of_the_other_format, r"expected \*_scale_inv"),
        (in_bfloat16, "bfloat16 with a scale"),
        (ignored, "says that they are not in FP8"),
    ],
)
def test_what_contradicts_itself_is_refused(
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None], says: str, tmp_path: Path, qwen3_vl_folder: Path
) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path, "block")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        list(read_weights(open_checkpoint(str(folder)), [DOWN]))
