"""Checkpoints that vLLM can serve on a CPU: its attention there takes no head_dim below 32."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

import vitrine_vlm.sample_models.tiny_vlm
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint, small_config

CheckpointName = Literal["qwen3_vl", "qwen2_5_vl", "tiny"]
CHECKPOINTS: tuple[CheckpointName, ...] = get_args(CheckpointName)


def checkpoint(name: CheckpointName, parent: Path) -> Path:
    """Returns the folder of the shipped tiny model, or a random checkpoint, which is made below `parent` if missing."""
    if name == "tiny":
        return Path(vitrine_vlm.sample_models.tiny_vlm.__file__).parent / "vitrine-tiny-vlm"
    folder = parent / name
    if folder.exists():
        return folder
    config = small_config(name)
    text = config.get_text_config()
    if isinstance(config, Qwen3VLConfig):
        text.head_dim = 32
        text.rope_parameters["mrope_section"] = [8, 4, 4]
    elif isinstance(config, Qwen2_5_VLConfig):
        # This family has no head_dim of its own: it is hidden_size over the number of heads.
        text.hidden_size = config.vision_config.out_hidden_size = 32 * text.num_attention_heads
        text.rope_parameters["mrope_section"] = [4, 6, 6]
    return save_random_checkpoint(folder, name, config=config)
