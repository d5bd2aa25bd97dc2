"""The decoder as fused kernels, with the weights of the plain one in `models/decoder.py`.

A layer is two pieces with attention between them: `before_attention` and `after_attention` read and write fixed tensors
only, so that they can be captured; attention depends on the step's sequences.

Shapes: T tokens, C hidden size, H query heads, D head dim, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitrine_vlm.gpu_kernels.norms import add_rms_norm
from vitrine_vlm.gpu_kernels.product import Product
from vitrine_vlm.gpu_kernels.rotary import rope_and_store_kv, rope_table
from vitrine_vlm.gpu_kernels.skinny_gemm import SKINNY_ROWS, skinny_gated_silu, skinny_linear, skinny_linear_add
from vitrine_vlm.llm_worker.models.decoder import DecoderLayer, Mlp, RMSNorm, TextDecoder
from vitrine_vlm.llm_worker.models.rotary import axis_of_frequency


class FusedDecoder:
    """The layers, rotary angles and last norm of a decoder."""

    def __init__(self, decoder: TextDecoder, sizes: tuple[int, ...]) -> None:
        """
        Args:
            decoder: shares its weights; those that are multiplied together are concatenated.
            sizes: numbers of tokens that steps will have, ascending; see `Product`.
        """
        config = decoder.config
        self._axis = axis_of_frequency(config).to(decoder.device, torch.int32)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=decoder.device) / config.head_dim
        self._inverse_frequencies = 1.0 / config.rope_theta**exponents
        sizes = tuple(size for size in sizes if size not in SKINNY_ROWS)  # for which there are other kernels
        self.layers = [FusedLayer(layer, sizes) for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        self._norm = decoder.norm

    def write_rope_table(self, positions_3T: torch.Tensor, cos_sin_T2F: torch.Tensor) -> None:
        """Computes the angles by which all layers of a step rotate queries and keys."""
        rope_table(positions_3T, self._inverse_frequencies, self._axis, cos_sin_T2F)

    def last_norm(self, x_TC: torch.Tensor, added: tuple[torch.Tensor, ...], out_TC: torch.Tensor) -> None:
        """Applies the norm behind the last layer.

        Args:
            added: tensors that are added to the residual stream before.
        """
        add_rms_norm(x_TC, added, self._norm.weight, self._norm.eps, out_TC)


class FusedLayer:
    """The two pieces of one layer, before and after attention."""

    def __init__(self, layer: DecoderLayer, sizes: tuple[int, ...]) -> None:
        self._group = layer.group
        attention = layer.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._qkv_weight = _side_by_side(projections)
        has_bias = attention.q_proj.bias is not None
        self._qkv_bias = torch.cat([each.bias for each in projections]) if has_bias else None
        norms = [each for each in (attention.q_norm, attention.k_norm) if isinstance(each, RMSNorm)]
        self._q_weight: torch.Tensor | None = norms[0].weight if norms else None
        self._k_weight: torch.Tensor | None = norms[1].weight if norms else None
        self._head_eps = norms[0].eps if norms else 0.0
        self._o_weight = attention.o_proj.weight
        self._mlp = layer.mlp
        if isinstance(layer.mlp, Mlp):
            self._gate_up_weight = _side_by_side([layer.mlp.gate_proj, layer.mlp.up_proj])
            self._gate_up = Product(self._gate_up_weight, activation="gated_silu", sizes=sizes)
        self._input_norm, self._post_norm = layer.input_layernorm, layer.post_attention_layernorm

    def before_attention(
        self,
        x_TC: torch.Tensor,
        added: tuple[torch.Tensor, ...],
        cos_sin_T2F: torch.Tensor,
        slot_mapping_T: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        q_THD: torch.Tensor,
    ) -> None:
        """Adds `added` to the residual stream, and writes queries, keys and values."""
        normed_TC = add_rms_norm(x_TC, added, self._input_norm.weight, self._input_norm.eps)
        linear = skinny_linear if len(x_TC) in SKINNY_ROWS else F.linear
        qkv_TX = linear(normed_TC, self._qkv_weight, self._qkv_bias)
        rope_and_store_kv(
            qkv_TX,
            cos_sin_T2F,
            self._q_weight,
            self._k_weight,
            self._head_eps,
            slot_mapping_T,
            k_cache_SKD,
            v_cache_SKD,
            q_THD,
        )

    def after_attention(self, x_TC: torch.Tensor, attended_TX: torch.Tensor) -> None:
        """Adds the outputs of attention and MLP to the residual stream."""
        self._add_product(x_TC, attended_TX, self._o_weight)
        normed_TC = add_rms_norm(x_TC, (), self._post_norm.weight, self._post_norm.eps)
        if not isinstance(self._mlp, Mlp):
            x_TC.add_(self._group.all_reduce(self._mlp(normed_TC)))
        elif len(x_TC) in SKINNY_ROWS:
            self._add_product(x_TC, skinny_gated_silu(normed_TC, self._gate_up_weight), self._mlp.down_proj.weight)
        else:
            self._add_product(x_TC, self._gate_up(normed_TC), self._mlp.down_proj.weight)

    def _add_product(self, to_TC: torch.Tensor, x_TX: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds x @ weight.T, summed over all ranks, in place."""
        skinny = len(x_TX) in SKINNY_ROWS
        if self._group.size > 1:
            to_TC.add_(self._group.all_reduce((skinny_linear if skinny else F.linear)(x_TX, weight)))
        elif skinny:
            skinny_linear_add(x_TX, weight, to_TC)
        else:
            to_TC.addmm_(x_TX, weight.t())


def _side_by_side(projections: list[torch.nn.Linear]) -> torch.Tensor:
    """Concatenates weights; the projections keep views of the result, so that nothing is in memory twice."""
    weight = torch.cat([each.weight for each in projections])
    parts = weight.split([each.out_features for each in projections])
    for projection, part in zip(projections, parts, strict=True):
        projection.weight.data = part
    return weight
