"""Seeded random checkpoints of the true architectures at small dims, with the same files as released ones.

With them tests need no download. The weights are drawn at scales that keep activations from vanishing, so another
picture or prompt gives another greedy answer; the answers themselves are noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen4ExpForConditionalGeneration,
)

from vitrine_vlm.sample_models.random_checkpoint.byte_tokenizer import (
    SPECIAL_TOKEN_IDS,
    printable_token_ids,
    save_byte_tokenizer,
)
from vitrine_vlm.sample_models.random_checkpoint.small_configs import Family, small_config

_MODEL_CLASSES: dict[Family, type[PreTrainedModel]] = {
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_5": Qwen3_5ForConditionalGeneration,
    "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    "qwen4_exp": Qwen4ExpForConditionalGeneration,
    "qwen3_omni_moe": Qwen3OmniMoeForConditionalGeneration,
}
_PROCESSOR_NAMES: dict[Family, str] = {
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_5": "Qwen3VL",
    "qwen3_5_moe": "Qwen3VL",
    "qwen4_exp": "Qwen3VL",
    "qwen3_omni_moe": "Qwen3OmniMoe",
}

_MIN_PIXELS = 64 * 64
_MAX_PIXELS = 512 * 512
_MAX_VIDEO_PIXELS = 16 * 128 * 128
_LOGITS_STD = 6.0


def save_random_checkpoint(
    folder: Path,
    family: Family,
    *,
    seed: int = 0,
    config: PretrainedConfig | None = None,
    max_shard_size: str | None = None,
) -> Path:
    """Writes a complete checkpoint: config, safetensors, generation, processor and tokenizer files.

    Args:
        folder: created if missing; files of an earlier call are overwritten.
        seed: the seed of the weights; equal seeds and configs give equal files.
        config: used instead of `small_config(family)`; its special token ids must be those of the byte tokenizer.
        max_shard_size: for example "200KB", to write several safetensors files and an index.

    Returns:
        `folder`.
    """
    config = config if config is not None else small_config(family)
    save_weightless_checkpoint(folder, family, config)
    model = _MODEL_CLASSES[family]._from_config(config, dtype=torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.generation_config = _generation_config()
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    return folder


def save_weightless_checkpoint(
    folder: Path, family: Family, config: PretrainedConfig, *, max_pixels: int = _MAX_PIXELS
) -> Path:
    """Writes what `--load-format dummy` needs: all files but the weights.

    Args:
        folder: created if missing; files of an earlier call are overwritten.
        config: its special token ids must be those of the byte tokenizer.
        max_pixels: larger pictures are scaled down.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _generation_config().save_pretrained(folder)
    _write_processor_configs(folder, family, config, max_pixels)
    save_byte_tokenizer(folder, config.get_text_config().vocab_size)
    return folder


def _generation_config() -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=SPECIAL_TOKEN_IDS["<|endoftext|>"],
        pad_token_id=SPECIAL_TOKEN_IDS["<|endoftext|>"],
        eos_token_id=[SPECIAL_TOKEN_IDS["<|im_end|>"], SPECIAL_TOKEN_IDS["<|endoftext|>"]],
    )


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrites every parameter so that the residual stream keeps unit scale and attention is not uniform."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif parameter.ndim == 1:
            # The spread of attention logits is the product of these two gains: with 1 attention would be near uniform.
            gain = 1.6 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            parameter.copy_(gain * (1.0 + 0.1 * noise))
        elif name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            parameter.copy_(noise)
        elif name.endswith("lm_head.weight"):
            parameter.copy_(noise * _LOGITS_STD / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(noise * _gain(name) / _fan_in(parameter) ** 0.5)
    # These checkpoints have no talker.
    thinker = getattr(model, "thinker", model)
    if not thinker.config.tie_word_embeddings:
        # A zero row has logit 0, far below the best of the others: answers are printable and do not end early.
        head = thinker.get_output_embeddings().weight
        unprintable = torch.ones(head.shape[0], dtype=torch.bool)
        unprintable[printable_token_ids()] = False
        head[unprintable] = 0.0


def _gain(name: str) -> float:
    # Patches of plain pictures are similar; a larger gain in the first layer separates them.
    return 2.0 if "patch_embed" in name else 1.3


def _fan_in(parameter: torch.Tensor) -> int:
    if parameter.ndim == 3:  # experts, [num_experts, out, in]
        return parameter.shape[-1]
    return parameter[0].numel()


def _write_processor_configs(folder: Path, family: Family, config: PretrainedConfig, max_pixels: int) -> None:
    """Writes the fields of the family's released checkpoints, with limits that keep videos small."""
    vision = getattr(config, "thinker_config", config).vision_config
    name = _PROCESSOR_NAMES[family]
    shared: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "processor_class": f"{name}Processor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    old_bounds: dict[str, Any] = {"min_pixels": _MIN_PIXELS, "max_pixels": max_pixels}
    if family == "qwen3_omni_moe":
        # There is no file for videos: the processor's class has their bounds.
        _write_json(
            folder / "preprocessor_config.json",
            shared | old_bounds | {"image_processor_type": "Qwen2VLImageProcessor"},
        )
        return
    if family == "qwen2_5_vl":
        shared |= {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        image = old_bounds | {"image_processor_type": "Qwen2VLImageProcessor"}
        video = {
            "min_pixels": _MIN_PIXELS,
            "max_pixels": 128 * 128,
            "video_processor_type": "Qwen2VLVideoProcessor",
        }
    else:
        image = {
            "size": {"shortest_edge": _MIN_PIXELS, "longest_edge": max_pixels},
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
        video = {
            # Of all frames together, unlike the bounds of pictures.
            "size": {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_VIDEO_PIXELS},
            "video_processor_type": "Qwen3VLVideoProcessor",
        }
    _write_json(folder / "preprocessor_config.json", shared | image)
    _write_json(folder / "video_preprocessor_config.json", shared | video)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
