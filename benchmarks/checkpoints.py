"""Checkpoints without weights for measurements with `--load-format dummy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen3VLConfig

from benchmarks.vit import QWEN3_VL_8B
from vitrine_vlm.sample_models.random_checkpoint import save_weightless_checkpoint, small_config, special_token_ids

# text_config of Qwen/Qwen3-VL-8B-Instruct.
QWEN3_VL_8B_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
    "vocab_size": 151936,
}
_MAX_PIXELS = 16_777_216  # as released


def save_qwen3_vl_8b(folder: Path) -> Path:
    """Writes the files of Qwen3-VL-8B, with a byte tokenizer: an ASCII character is a token."""
    config = Qwen3VLConfig(
        text_config=dict(QWEN3_VL_8B_TEXT),
        vision_config=dict(QWEN3_VL_8B),
        tie_word_embeddings=False,
        **special_token_ids(),
    )
    return save_weightless_checkpoint(folder, "qwen3_vl", config, max_pixels=_MAX_PIXELS)


def save_small_qwen3_vl(folder: Path) -> Path:
    """Writes the files of the same architecture at dims small enough for a CPU."""
    return save_weightless_checkpoint(folder, "qwen3_vl", small_config("qwen3_vl"))
