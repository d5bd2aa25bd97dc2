"""The true architectures at small dims."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import (
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3OmniMoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen4ExpConfig,
)

from vitrine_vlm.sample_models.random_checkpoint.byte_tokenizer import SPECIAL_TOKEN_IDS

Family = Literal["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen3_omni_moe"]

_VOCAB_SIZE = 304
# Released checkpoints use millions, with 128 dims per head. With the few dims here most of them, and so whole M-RoPE
# axes, would then have no effect on the tokens.
_ROPE_THETA = 300.0
_LINEAR_ATTENTION: dict[Family, type[PretrainedConfig]] = {
    "qwen3_5": Qwen3_5Config,
    "qwen3_5_moe": Qwen3_5MoeConfig,
    "qwen4_exp": Qwen4ExpConfig,
}
_INDEXER: dict[Family, dict[str, int]] = {
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 24,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
}


def special_token_ids() -> dict[str, int]:
    """Returns the fields of config.json with the byte tokenizer's special tokens."""
    return {
        "image_token_id": SPECIAL_TOKEN_IDS["<|image_pad|>"],
        "video_token_id": SPECIAL_TOKEN_IDS["<|video_pad|>"],
        "vision_start_token_id": SPECIAL_TOKEN_IDS["<|vision_start|>"],
        "vision_end_token_id": SPECIAL_TOKEN_IDS["<|vision_end|>"],
    }


def small_config(family: Family) -> PretrainedConfig:
    """Returns a config with all features of the family's architecture and dims small enough for a test.

    Args:
        family: the architecture; with deepstack, its vision layers are 1, 2 and 3.

    Raises:
        ValueError: `family` is not one of `Family`.
    """
    special_ids = special_token_ids()
    text: dict[str, Any] = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "bos_token_id": SPECIAL_TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": SPECIAL_TOKEN_IDS["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    qwen3_text = text | {
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _ROPE_THETA,
            "mrope_section": [6, 3, 3],
            "mrope_interleaved": True,
        },
    }
    qwen3_vision = {
        "depth": 5,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 16,
        "out_hidden_size": 96,
        "num_position_embeddings": 144,
    }
    deepstack = {"deepstack_visual_indexes": [1, 2, 3]}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    if family == "qwen3_vl":
        return Qwen3VLConfig(text_config=qwen3_text, vision_config=qwen3_vision | deepstack, **special_ids)
    if family == "qwen3_vl_moe":
        # No released checkpoint has dense layers, but the architecture allows them.
        moe_text = qwen3_text | experts | {"mlp_only_layers": [2]}
        return Qwen3VLMoeConfig(text_config=moe_text, vision_config=qwen3_vision | deepstack, **special_ids)
    if family in _LINEAR_ATTENTION:
        linear = {
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 64,
            "rope_parameters": qwen3_text["rope_parameters"] | {"partial_rotary_factor": 1.0},
        }
        return _LINEAR_ATTENTION[family](
            text_config=qwen3_text | experts | linear | _INDEXER.get(family, {}),
            vision_config=qwen3_vision,
            **special_ids,
        )
    if family == "qwen3_omni_moe":
        audio = {
            "encoder_layers": 1,
            "d_model": 32,
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "output_dim": 96,
            "downsample_hidden_size": 16,
        }
        thinker = {
            "text_config": qwen3_text | experts,
            "vision_config": qwen3_vision | deepstack,
            "audio_config": audio,
            "image_token_id": special_ids["image_token_id"],
            "video_token_id": special_ids["video_token_id"],
        }
        return Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    if family == "qwen2_5_vl":
        qwen2_5_text = text | {
            "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA, "mrope_section": [2, 3, 3]}
        }
        qwen2_5_vision = {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "out_hidden_size": 96,
        }
        return Qwen2_5_VLConfig(text_config=qwen2_5_text, vision_config=qwen2_5_vision, **special_ids)
    raise ValueError(f"unknown family {family!r}: expected one of {get_args(Family)}")
