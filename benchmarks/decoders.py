"""Text decoders of published dims with random weights: ours and transformers' with the same ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from benchmarks.towers import draw_weights
from llm_worker.models.config import TextConfig
from llm_worker.models.decoder import TextDecoder

# text_config of Qwen/Qwen3-VL-8B-Instruct.
QWEN3_VL_8B_TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
NUM_DEEPSTACK = 3


def qwen3_vl_8b_decoder(device: torch.device, num_layers: int | None = None) -> TextDecoder:
    """bfloat16, weights at scales that keep the residual stream lively; seeded.

    Args:
        num_layers: None for all 36.
    """
    text = QWEN3_VL_8B_TEXT
    config = TextConfig(
        model_type="qwen3_vl",
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=num_layers or text["num_hidden_layers"],
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=text["rope_parameters"]["rope_theta"],
        mrope_section=tuple(text["rope_parameters"]["mrope_section"]),
        mrope_interleaved=True,
        qk_norm=True,
        qkv_bias=False,
        tie_word_embeddings=False,
        max_position_embeddings=text["max_position_embeddings"],
        num_deepstack=NUM_DEEPSTACK,
        moe=None,
    )
    with torch.device("meta"):
        decoder = TextDecoder(config).to(torch.bfloat16)
    decoder.to_empty(device=device)
    torch.manual_seed(0)
    draw_weights(decoder)
    return decoder.eval()


class TransformersDecoder(nn.Module):
    """transformers' own model, eager, with `sdpa`, over our decoder's weights: nothing is in memory twice."""

    def __init__(self, decoder: TextDecoder) -> None:
        super().__init__()
        text = QWEN3_VL_8B_TEXT | {"num_hidden_layers": decoder.config.num_hidden_layers}
        config = Qwen3VLConfig(text_config=text).text_config
        with torch.device("meta"):
            self.model = Qwen3VLTextModel._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        weights = {name: each for name, each in decoder.state_dict().items() if not name.startswith("lm_head.")}
        self.model.load_state_dict(weights, assign=True, strict=True)
        # The only tensors that are no weights.
        rotary = type(self.model.rotary_emb)(config).to(decoder.device)
        self.model.rotary_emb = rotary
        self._lm_head = decoder.lm_head

    def filled_cache(self, batch: int, num_tokens: int) -> DynamicCache:
        """Random keys and values of so many tokens of each sequence."""
        config, cache = self.model.config, DynamicCache()
        shape = (2, batch, config.num_key_value_heads, num_tokens, config.head_dim)
        for layer in range(config.num_hidden_layers if num_tokens else 0):
            cache.update(*torch.randn(shape, device=self._lm_head.weight.device, dtype=torch.bfloat16).unbind(), layer)
        return cache

    def forward(self, token_ids_BT: torch.Tensor, positions_3BT: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits of each sequence's last token, [B, V]."""
        out = self.model(
            input_ids=token_ids_BT, position_ids=positions_3BT, past_key_values=cache, use_cache=cache is not None
        )
        logits_BV: torch.Tensor = self._lm_head(out.last_hidden_state[:, -1])
        return logits_BV
