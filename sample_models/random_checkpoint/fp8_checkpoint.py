"""Writes checkpoints in FP8 from others, with the tensors and the config.json of released ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

Fp8Layout = Literal["block", "channel"]

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_INDEX = "model.safetensors.index.json"
_LANGUAGE = re.compile(r".*layers\.\d+\.(self_attn|mlp)\.(\w+_proj\.weight|experts\.(gate_up|down)_proj)$")
_VISION = re.compile(r".*visual\.blocks\.\d+\..*\.weight$")


def save_fp8_checkpoint(
    source: Path,
    folder: Path,
    layout: Fp8Layout,
    *,
    block: tuple[int, int] = (128, 128),
    vision: bool = False,
) -> Path:
    """Writes a checkpoint again with the projections of its text layers in FP8; lm_head and all else stay as they are.

    Args:
        source: a checkpoint's folder, in one safetensors file.
        folder: created if missing.
        layout: "block" as in Qwen's own FP8 models (`quant_method: fp8`), "channel" as llm-compressor's FP8_DYNAMIC
            (`compressed-tensors`), which stores experts one by one.
        block: outputs and inputs that share a scale, for "block".
        vision: whether the products of the tower's blocks are in FP8, too, which released checkpoints leave alone.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != _INDEX:
            shutil.copyfile(path, folder / path.name)
    suffix = "_scale_inv" if layout == "block" else "_scale"
    tensors: dict[str, torch.Tensor] = {}
    plain: list[str] = []
    for name, stored in load_file(source / "model.safetensors").items():
        whole = _LANGUAGE.fullmatch(name) or (vision and stored.ndim == 2 and _VISION.fullmatch(name))
        if not whole:
            tensors[name] = stored
            if name.endswith(".weight"):
                plain.append(name.removesuffix(".weight"))
            continue
        for part, weight in [(name, stored)] if layout == "block" or stored.ndim == 2 else _experts(name, stored):
            size = block if layout == "block" else (1, weight.shape[-1])
            tensors[part], tensors[part + suffix] = _quantized(weight, size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _fine_grained(block, plain) if layout == "block" else _compressed_tensors(plain)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _quantized(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [..., O, I] in e4m3, and its scales in bfloat16 [..., ceil(O / rows), ceil(I / columns)]."""
    (rows, columns), (height, width) = block, weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    # Rounded first: the values are those that fit the scale as it is stored.
    scale = (blocks.abs().amax((-3, -1)) / _FP8_MAX).clamp_min(1e-12).bfloat16()
    values = blocks / scale.float()[..., :, None, :, None]
    values = values.flatten(-4, -3).flatten(-2)[..., :height, :width]
    return values.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).contiguous(), scale


def _experts(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The weights of all experts one by one, by the names of their own linear layers."""
    module, _, kind = name.rpartition(".")
    parts = {"down_proj": weight}
    if kind == "gate_up_proj":
        gate, up = weight.chunk(2, 1)
        parts = {"gate_proj": gate, "up_proj": up}
    return [(f"{module}.{e}.{part}.weight", each[e]) for part, each in parts.items() for e in range(len(each))]


def _fine_grained(block: tuple[int, int], plain: list[str]) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "modules_to_not_convert": plain,
    }


def _compressed_tensors(plain: list[str]) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "symmetric": True,
        "type": "float",
    }
    group = {
        "format": "float-quantized",
        "input_activations": shared | {"dynamic": True, "observer": None, "strategy": "token"},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": shared | {"dynamic": False, "observer": "minmax", "strategy": "channel"},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": plain,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
