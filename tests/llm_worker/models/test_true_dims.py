"""One decoder layer at the released models' dims equals transformers' (fp32, random weights, small vocabulary)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeTextModel,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

from vitrine_vlm.llm_worker.models.config import MoeConfig, TextConfig
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice

NUM_TOKENS = 40
SHARED: dict[str, Any] = {"vocab_size": 32, "num_hidden_layers": 1, "rms_norm_eps": 1e-6}
EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN2_5_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
# 16 of its 128 experts: all of them would be 2.4 GB of weights to draw.
THIRTY_B_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
INTERLEAVED = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
IN_BLOCKS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def decoder_config(dims: dict[str, Any], model_type: str, rope: dict[str, Any], num_deepstack: int) -> TextConfig:
    moe = None
    if "num_experts" in dims:
        moe = MoeConfig(
            dims["num_experts"], dims["num_experts_per_tok"], dims["moe_intermediate_size"], True, frozenset({0})
        )
    return TextConfig(
        model_type=model_type,
        **SHARED,
        **{name: dims[name] for name in QWEN2_5_7B},
        head_dim=dims.get("head_dim", dims["hidden_size"] // dims["num_attention_heads"]),
        rope_theta=rope["rope_theta"],
        mrope_section=tuple(rope["mrope_section"]),
        mrope_interleaved=model_type != "qwen2_5_vl",
        qk_norm=model_type != "qwen2_5_vl",
        qkv_bias=model_type == "qwen2_5_vl",
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        num_deepstack=num_deepstack,
        moe=moe,
    )


CASES = {
    "qwen3_vl_8b": (Qwen3VLTextModel, Qwen3VLTextConfig, EIGHT_B, "qwen3_vl", INTERLEAVED, 1),
    "qwen3_vl_30b_a3b": (Qwen3VLMoeTextModel, Qwen3VLMoeTextConfig, THIRTY_B_A3B, "qwen3_vl_moe", INTERLEAVED, 1),
    "qwen2_5_vl_7b": (Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig, QWEN2_5_7B, "qwen2_5_vl", IN_BLOCKS, 0),
}


@pytest.mark.parametrize("name", list(CASES))
@torch.inference_mode()
def test_layer_at_true_dims(name: str) -> None:
    model_class, config_class, dims, model_type, rope, num_deepstack = CASES[name]
    torch.manual_seed(0)
    config = config_class(**SHARED, **dims, rope_parameters=dict(rope), max_position_embeddings=4096)
    reference = model_class(config).eval()
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    with torch.device("meta"):
        decoder = TextDecoder(decoder_config(dims, model_type, rope, num_deepstack)).eval()
    lm_head = {"lm_head.weight": torch.empty(decoder.lm_head.weight.shape)}  # not part of their text model
    decoder.load_state_dict(reference.state_dict() | lm_head, assign=True)

    embeds_TC = torch.randn(NUM_TOKENS, dims["hidden_size"])
    # Text, a 4 x 5 picture, text: all three axes differ.
    grid = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(4), torch.arange(5), indexing="ij")).reshape(3, -1)
    positions_3T = torch.cat([torch.arange(10).expand(3, -1), grid + 10, torch.arange(15, 25).expand(3, -1)], dim=1)
    media = slice(10, 30)
    deepstack_NTC = torch.zeros(num_deepstack, NUM_TOKENS, dims["hidden_size"])
    deepstack_NTC[:, media] = torch.randn(num_deepstack, 20, dims["hidden_size"])

    extra: dict[str, Any] = {}
    if num_deepstack:
        mask = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
        mask[:, media] = True
        extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(deepstack_NTC[:, media])}
    expected_TC = reference(
        inputs_embeds=embeds_TC[None], position_ids=positions_3T[:, None], **extra
    ).last_hidden_state[0]

    kv_shape = (1, 2, 64, dims["num_key_value_heads"], decoder.config.head_dim)
    slots = torch.randperm(64)[:NUM_TOKENS]
    inputs = StepInputs(
        embeds_TC,
        deepstack_NTC if num_deepstack else None,
        positions_3T,
        slots,
        [SequenceSlice(0, NUM_TOKENS, NUM_TOKENS, BlockTable(slots.tolist()))],
    )
    assert (decoder(inputs, torch.zeros(kv_shape)) - expected_TC).abs().max() <= 1e-3
