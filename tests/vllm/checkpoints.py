"""Checkpoints that vLLM can serve on a CPU: its attention there takes no head_dim below 32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import vitrine_vlm.sample_models.tiny_vlm
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint, small_config

CheckpointName = Literal["qwen3_vl", "qwen2_5_vl", "tiny"]
CHECKPOINTS: tuple[CheckpointName, ...] = get_args(CheckpointName)
Folders = dict[CheckpointName, Path]

_HEAD_DIM = 32


def make_checkpoints(parent: Path) -> Folders:
    """Returns the folders of two random checkpoints, which are made below `parent`, and of the shipped tiny model."""
    return {
        "qwen3_vl": random_qwen3_vl(parent / "qwen3_vl"),
        "qwen2_5_vl": _random_qwen2_5_vl(parent / "qwen2_5_vl"),
        "tiny": Path(vitrine_vlm.sample_models.tiny_vlm.__file__).parent / "vitrine-tiny-vlm",
    }


def random_qwen3_vl(folder: Path, *, hidden_size: int = 96, seed: int = 0) -> Path:
    """Writes a Qwen3-VL; others of the same seed and hidden size are equal to it."""
    config = small_config("qwen3_vl")
    text = config.get_text_config()
    text.head_dim = _HEAD_DIM
    text.rope_parameters["mrope_section"] = [8, 4, 4]
    text.hidden_size = config.vision_config.out_hidden_size = hidden_size
    return save_random_checkpoint(folder, "qwen3_vl", config=config, seed=seed)


def _random_qwen2_5_vl(folder: Path) -> Path:
    config = small_config("qwen2_5_vl")
    text = config.get_text_config()
    # This family has no head_dim of its own: it is hidden_size over the number of heads.
    text.hidden_size = config.vision_config.out_hidden_size = _HEAD_DIM * text.num_attention_heads
    text.rope_parameters["mrope_section"] = [4, 6, 6]
    return save_random_checkpoint(folder, "qwen2_5_vl", config=config)


def factor_of(folder: Path) -> int:
    """Returns the pixels along a side of one merged token."""
    vision = _config(folder)["vision_config"]
    return int(vision["patch_size"] * vision["spatial_merge_size"])


def model_type_of(folder: Path) -> str:
    return str(_config(folder)["model_type"])


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
