"""The text decoder of all families, which differ only in their `TextConfig`.

It reads only the step's input buffers, to which text and media embeddings have been written.

Shapes: T tokens of the step, C hidden size, N deepstack layers, H query heads, K key/value heads, D head dim,
V vocabulary.

Source: the text models of transformers 5.23 that the families name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.kv_slots import UNSCALED, write_slots
from vitrine_vlm.llm_worker.models.moe import SparseMoe
from vitrine_vlm.llm_worker.models.paged_attention import AttentionPlan, SequenceSlice, paged_attention, plan_attention
from vitrine_vlm.llm_worker.models.rank_group import OneRank, RankGroup
from vitrine_vlm.llm_worker.models.rotary import Rotary, rotary_at


@dataclass(frozen=True)
class StepInputs:
    """One step's slices of the static buffers.

    embeds_TC, positions_3T, slot_mapping_T: the tokens, their M-RoPE positions, and the cache slots of their KV.
    deepstack_NTC: added after the first N layers, zero at text positions; None where no token of the step has any.
    sequences: the sequences of the tokens, in order.
    """

    embeds_TC: torch.Tensor
    deepstack_NTC: torch.Tensor | None
    positions_3T: torch.Tensor
    slot_mapping_T: torch.Tensor
    sequences: Sequence[SequenceSlice]


@dataclass(frozen=True)
class StepShared:
    """Values that are computed once a step and read by all layers."""

    rotary: Rotary
    attention: AttentionPlan
    slot_mapping_T: torch.Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_float = x.float()
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_float * scale).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.kv_scales = UNSCALED

    def forward(self, x_TC: torch.Tensor, shared: StepShared, kv_cache_2SKD: torch.Tensor) -> torch.Tensor:
        q_THD, k_TKD, v_TKD = (
            projection(x_TC).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_THD = shared.rotary.apply_rope(self.q_norm(q_THD))
        k_cache_SKD, v_cache_SKD = kv_cache_2SKD
        k_TKD = shared.rotary.apply_rope(self.k_norm(k_TKD))
        write_slots(k_cache_SKD, shared.slot_mapping_T, k_TKD, self.kv_scales.k)
        write_slots(v_cache_SKD, shared.slot_mapping_T, v_TKD, self.kv_scales.v)
        out_THD = paged_attention(q_THD, k_cache_SKD, v_cache_SKD, shared.attention, self.kv_scales)
        return self.o_proj(out_THD.flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int, group: RankGroup) -> None:
        super().__init__()
        self.group = group
        self.self_attn = Attention(config)
        sparse = config.moe is not None and layer in config.moe.sparse_layers
        self.mlp = SparseMoe(config.hidden_size, config.moe) if sparse and config.moe else Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TC: torch.Tensor, shared: StepShared, kv_cache_2SKD: torch.Tensor) -> torch.Tensor:
        x_TC = x_TC + self.group.all_reduce(self.self_attn(self.input_layernorm(x_TC), shared, kv_cache_2SKD))
        return x_TC + self.group.all_reduce(self.mlp(self.post_attention_layernorm(x_TC)))


class TextDecoder(nn.Module):
    """The decoder. Its parameters have the names of the checkpoints, below their family's prefix.

    Args:
        config: of this rank's part, see `sharding.py`.
        group: the ranks that have the other parts.
    """

    def __init__(self, config: TextConfig, group: RankGroup | None = None) -> None:
        super().__init__()
        self.config = config
        self.group = group if group is not None else OneRank()
        # nn.Embedding's own initialization would import torch's compiler, 1.3 s, to fill a weight that is loaded later.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, self.group) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size // self.group.size, bias=False)
        if config.tie_word_embeddings and self.group.size == 1:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def embed(self, token_ids_T: torch.Tensor, out_TC: torch.Tensor) -> None:
        """Writes text embeddings to `out_TC`, [T, C]."""
        torch.index_select(self.embed_tokens.weight, 0, token_ids_T, out=out_TC)

    def forward(self, inputs: StepInputs, kv_caches_L2SKD: torch.Tensor) -> torch.Tensor:
        """Runs one step; keys and values of its tokens are written into the cache of each layer.

        Returns:
            Hidden states after the last norm, [T, C].
        """
        shared = StepShared(
            rotary_at(inputs.positions_3T, self.config, self.dtype),
            plan_attention(inputs.sequences, self.device),
            inputs.slot_mapping_T,
        )
        x_TC = inputs.embeds_TC
        for layer, (block, kv_cache_2SKD) in enumerate(zip(self.layers, kv_caches_L2SKD, strict=True)):
            x_TC = block(x_TC, shared, kv_cache_2SKD)
            if inputs.deepstack_NTC is not None and layer < len(inputs.deepstack_NTC):
                x_TC = x_TC + inputs.deepstack_NTC[layer]
        return self.norm(x_TC)

    def logits(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Logits, [T, V], in the model's dtype."""
        return self.group.gather_columns(self.lm_head(hidden_TC))
