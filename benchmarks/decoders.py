"""Text decoders of published dims with equal random weights: Vitrine's and transformers'."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers import DynamicCache, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from benchmarks.checkpoints import QWEN3_VL_8B_TEXT, save_qwen3_vl_8b
from benchmarks.vit import QWEN3_VL_8B, draw_weights
from vitrine_vlm.gpu_kernels.fp8_weight import FP8, FP8_MAX, Fp8Weight
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.quantization import projection_weights, quantize, set_fp8_weights
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

_BLOCK = 128
NUM_DEEPSTACK = len(QWEN3_VL_8B["deepstack_visual_indexes"])


Scales: TypeAlias = Literal["channel", "block"]


def qwen3_vl_8b_decoder(
    device: torch.device, num_layers: int | None = None, fp8_scales: Scales | None = None
) -> TextDecoder:
    """Returns a seeded decoder in bfloat16, with weights at scales that keep the residual stream from vanishing.

    Args:
        num_layers: the number of layers; None for all 36.
        fp8_scales: whether the same weights are in FP8, with a scale a channel or a block of 128 x 128.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = text_config(open_checkpoint(str(save_qwen3_vl_8b(Path(folder))), load_format="dummy"))
    config = replace(config, num_hidden_layers=num_layers or config.num_hidden_layers)
    with torch.device("meta"):
        decoder = TextDecoder(config).to(torch.bfloat16)
    decoder.to_empty(device=device)
    torch.manual_seed(0)
    draw_weights(decoder)
    if fp8_scales == "channel":
        quantize(decoder, keep=True)
    elif fp8_scales == "block":
        set_fp8_weights(
            decoder,
            {name: _by_block(decoder.get_parameter(name).data) for name in projection_weights(decoder)},
            torch.bfloat16,
        )
    return decoder.eval()


def _by_block(weight_OI: torch.Tensor) -> Fp8Weight:
    blocks = weight_OI.float().unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    values = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return Fp8Weight(values.to(FP8), scale, (_BLOCK, _BLOCK))


class TransformersDecoder(nn.Module):
    """transformers' own model, eager, with `sdpa`, which shares the weights of a Vitrine decoder."""

    def __init__(self, decoder: TextDecoder) -> None:
        super().__init__()
        text = QWEN3_VL_8B_TEXT | {"num_hidden_layers": decoder.config.num_hidden_layers}
        config = Qwen3VLConfig(text_config=text).text_config
        with torch.device("meta"):
            self.model = Qwen3VLTextModel._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        weights = {name: each for name, each in decoder.state_dict().items() if not name.startswith("lm_head.")}
        self.model.load_state_dict(weights, assign=True, strict=True)
        # The only tensors that are not weights.
        rotary = type(self.model.rotary_emb)(config).to(decoder.device)
        self.model.rotary_emb = rotary
        self._lm_head = decoder.lm_head

    def filled_cache(self, batch: int, num_tokens: int) -> DynamicCache:
        """Returns a cache with random keys and values of `num_tokens` tokens of each sequence."""
        config, cache = self.model.config, DynamicCache()
        shape = (2, batch, config.num_key_value_heads, num_tokens, config.head_dim)
        for layer in range(config.num_hidden_layers if num_tokens else 0):
            cache.update(*torch.randn(shape, device=self._lm_head.weight.device, dtype=torch.bfloat16).unbind(), layer)
        return cache

    def forward(self, token_ids_BT: torch.Tensor, positions_3BT: torch.Tensor, cache: Any) -> torch.Tensor:
        """Returns the logits of each sequence's last token, [B, V]."""
        out = self.model(
            input_ids=token_ids_BT, position_ids=positions_3BT, past_key_values=cache, use_cache=cache is not None
        )
        logits_BV: torch.Tensor = self._lm_head(out.last_hidden_state[:, -1])
        return logits_BV
