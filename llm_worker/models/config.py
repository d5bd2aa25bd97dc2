"""The text decoder's part of config.json, for all families and every spelling in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in `sparse_layers`; the others have a dense MLP."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]


@dataclass(frozen=True)
class TextConfig:
    """Dims and features of one decoder.

    mrope_section: numbers of frequencies that rotate with the t, h and w position; mrope_interleaved: these alternate
    instead of lying in blocks. qk_norm: each query and key head is normalized. qkv_bias: the projections to queries,
    keys and values have a bias. num_deepstack: the number of first layers after which deepstack is added.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    qk_norm: bool
    qkv_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_deepstack: int
    moe: MoeConfig | None


def read_text_config(
    checkpoint: Checkpoint, *, mrope_interleaved: bool, qk_norm: bool, qkv_bias: bool, moe: bool
) -> TextConfig:
    """Reads config.json, flat (as some older ones are) or nested.

    Args:
        mrope_interleaved, qk_norm: see `TextConfig`.
        qkv_bias: whether the family's projections have a bias; where False, config.json's `attention_bias` decides.
        moe: whether the family's layers have experts.

    Raises:
        CheckpointError: a rope kind that is not supported, or a missing field.
    """
    config = checkpoint.config
    text: dict[str, Any] = config.get("text_config") or config
    rope = (text.get("rope_parameters") or {}) | (text.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"rope_type {kind!r} is not supported, only default M-RoPE is")
    try:
        return TextConfig(
            model_type=config["model_type"],
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            mrope_section=tuple(rope["mrope_section"]),
            mrope_interleaved=mrope_interleaved,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias or bool(text.get("attention_bias")),
            # The whole model's value is used, as in transformers; the text model's where there is no other.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            max_position_embeddings=text["max_position_embeddings"],
            num_deepstack=len(config["vision_config"].get("deepstack_visual_indexes") or ()),
            moe=_moe_config(text) if moe else None,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} has no {error.args[0]} for the text model"
        ) from error


def _moe_config(text: dict[str, Any]) -> MoeConfig:
    step = text.get("decoder_sparse_step", 1)
    dense = set(text.get("mlp_only_layers") or ())
    # transformers 5 writes num_local_experts, released checkpoints num_experts.
    num_experts = text["num_local_experts"] if "num_local_experts" in text else text["num_experts"]
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=text["num_experts_per_tok"],
        moe_intermediate_size=text["moe_intermediate_size"],
        norm_topk_prob=text.get("norm_topk_prob", True),
        sparse_layers=frozenset(
            layer for layer in range(text["num_hidden_layers"]) if layer not in dense and (layer + 1) % step == 0
        ),
    )
