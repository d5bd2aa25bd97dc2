"""The Qwen3-VL architecture at dims that fit 12 MiB, and the other files of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Qwen3VLConfig

from vitrine_vlm.sample_models.tiny_vlm.data.canvas import MAX_SIDE, MIN_SIDE
from vitrine_vlm.sample_models.tiny_vlm.training.tokenizer import SPECIAL_TOKEN_IDS, VOCAB_SIZE

_MAX_VIDEO_PIXELS = 16 * 192 * 192


def tiny_config() -> Qwen3VLConfig:
    """Returns a config of 5.9 million parameters: tower 128 wide, three deepstack layers, decoder 256 wide, M-RoPE."""
    text: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "bos_token_id": SPECIAL_TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": SPECIAL_TOKEN_IDS["<|im_end|>"],
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 8,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 4,
        "patch_size": 16,
        "out_hidden_size": 256,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [1, 3, 5],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=SPECIAL_TOKEN_IDS["<|image_pad|>"],
        video_token_id=SPECIAL_TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=SPECIAL_TOKEN_IDS["<|vision_end|>"],
    )


def generation_config() -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=SPECIAL_TOKEN_IDS["<|endoftext|>"],
        pad_token_id=SPECIAL_TOKEN_IDS["<|endoftext|>"],
        eos_token_id=[SPECIAL_TOKEN_IDS["<|im_end|>"], SPECIAL_TOKEN_IDS["<|endoftext|>"]],
    )


def save_processor_configs(folder: Path) -> None:
    """Writes preprocessor_config.json and video_preprocessor_config.json, as in released checkpoints."""
    shared = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {
        "size": {"shortest_edge": MIN_SIDE**2, "longest_edge": MAX_SIDE**2},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {
        # Of all frames together, unlike the bounds of pictures.
        "size": {"shortest_edge": MIN_SIDE**2, "longest_edge": _MAX_VIDEO_PIXELS},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    for name, content in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(shared | content, indent=2) + "\n", encoding="utf-8")
