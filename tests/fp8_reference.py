"""A dequantization of FP8 checkpoints that shares nothing with the services': a plain checkpoint with their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def dequantized_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, those in FP8 times their scales in float32; experts that are stored one by one are put together."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        if tensor.dtype != torch.float8_e4m3fn:
            found[name] = tensor
            continue
        if config["quant_method"] == "fp8":
            rows, columns = config["weight_block_size"]
            scale = tensors[name + "_scale_inv"].float()
            ones = torch.ones(rows, columns)
            scales = [torch.kron(each, ones) for each in scale.reshape(-1, *scale.shape[-2:])]
            scale = torch.stack(scales)[:, : tensor.shape[-2], : tensor.shape[-1]].reshape(tensor.shape)
        else:
            scale = tensors[name + "_scale"].float()
        found[name] = tensor.float() * scale
    return _with_fused_experts(found)


def save_dequantized(source: Path, folder: Path) -> Path:
    """Writes a checkpoint without FP8 that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    save_file(dequantized_tensors(source), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _with_fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    single = sorted((name for name in tensors if ".experts." in name and name.endswith(".weight")), key=_expert)
    for name in single:
        module, kind = name.split(".experts.")[0] + ".experts.", name.split(".")[-2]
        if kind == "up_proj":
            continue
        others = [each for each in single if each.startswith(module) and each.split(".")[-2] == kind]
        if name == others[0]:
            stacked = torch.stack([tensors[each] for each in others])
            if kind == "gate_proj":
                ups = torch.stack([tensors[each.replace("gate_proj", "up_proj")] for each in others])
                stacked, kind = torch.cat([stacked, ups], 1), "gate_up_proj"
            tensors[module + kind] = stacked
    return {name: tensor for name, tensor in tensors.items() if name not in single}


def _expert(name: str) -> int:
    return int(name.split(".experts.")[1].split(".")[0])
