"""The decoder as fused kernels, with the weights of the plain one in `models/decoder.py`.

A layer is two pieces with attention between them: `before_attention` and `after_attention` read and write fixed tensors
only, so that they can be captured; attention depends on the step's sequences.

Shapes: T tokens, C hidden size, H query heads, D head dim, S slots.
"""

from __future__ import annotations

import torch

from vitrine_vlm.gpu_kernels.fp8 import Rows
from vitrine_vlm.gpu_kernels.fp8_product import Epilogue
from vitrine_vlm.gpu_kernels.norms import add_rms_norm
from vitrine_vlm.gpu_kernels.rotary import rope_and_store_kv, rope_table
from vitrine_vlm.llm_worker.gpu.projections import Projection, projection
from vitrine_vlm.llm_worker.models.decoder import DecoderLayer, Mlp, RMSNorm, TextDecoder
from vitrine_vlm.llm_worker.models.rotary import axis_of_frequency


class FusedDecoder:
    """The layers, rotary angles and last norm of a decoder."""

    def __init__(self, decoder: TextDecoder, sizes: tuple[int, ...]) -> None:
        """
        Args:
            decoder: shares its weights; those that are multiplied together are concatenated.
            sizes: numbers of tokens that steps will have, ascending; see `projection`.
        """
        config = decoder.config
        self._axis = axis_of_frequency(config).to(decoder.device, torch.int32)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=decoder.device) / config.head_dim
        self._inverse_frequencies = 1.0 / config.rope_theta**exponents
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
    """The two pieces of one layer, before and after attention.

    kv_scales: of its keys and values in a cache in FP8.
    """

    def __init__(self, layer: DecoderLayer, sizes: tuple[int, ...]) -> None:
        self._group = layer.group
        attention, dtype = layer.self_attn, layer.input_layernorm.weight.dtype
        self.kv_scales = attention.kv_scales
        self._qkv = projection([attention.q_proj, attention.k_proj, attention.v_proj], dtype, sizes)
        norms = [each for each in (attention.q_norm, attention.k_norm) if isinstance(each, RMSNorm)]
        self._q_weight: torch.Tensor | None = norms[0].weight if norms else None
        self._k_weight: torch.Tensor | None = norms[1].weight if norms else None
        self._head_eps = norms[0].eps if norms else 0.0
        adds: Epilogue = "add" if layer.group.size == 1 else "none"
        self._o = projection([attention.o_proj], dtype, sizes, adds, quantizes=True)
        self._mlp = layer.mlp
        if isinstance(layer.mlp, Mlp):
            self._gate_up = projection([layer.mlp.gate_proj, layer.mlp.up_proj], dtype, sizes, "gated_silu")
            self._down = projection([layer.mlp.down_proj], dtype, sizes, adds)
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
        norm, fp8 = self._input_norm, self._qkv.takes_fp8(len(x_TC))
        qkv_TX = self._qkv(add_rms_norm(x_TC, added, norm.weight, norm.eps, fp8=fp8))
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
            self.kv_scales,
        )

    def after_attention(self, x_TC: torch.Tensor, attended_TX: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Adds the outputs of attention and MLP to the residual stream, and returns what is left for the next norm."""
        pending = self._add_product(x_TC, self._o, attended_TX)
        norm, is_dense = self._post_norm, isinstance(self._mlp, Mlp)
        fp8 = is_dense and self._gate_up.takes_fp8(len(x_TC))
        normed_TC = add_rms_norm(x_TC, pending, norm.weight, norm.eps, fp8=fp8)
        if not is_dense:
            return (self._group.all_reduce(self._mlp(normed_TC)),)
        inner_TX = self._gate_up.gated_silu(normed_TC, quantized=self._down.takes_fp8(len(x_TC)))
        return self._add_product(x_TC, self._down, inner_TX)

    def _add_product(self, to_TC: torch.Tensor, by: Projection, x_TX: Rows) -> tuple[torch.Tensor, ...]:
        """Adds a product, summed over all ranks, in place, or returns what the next norm has to add."""
        return by.add_to(to_TC, x_TX) if self._group.size == 1 else (self._group.all_reduce(by(x_TX)),)
