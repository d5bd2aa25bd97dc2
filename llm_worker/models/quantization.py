"""Quantizes a decoder whose checkpoint is not in FP8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.llm_worker.models.decoder import Attention, Mlp, TextDecoder


def projections(decoder: TextDecoder) -> Iterator[nn.Linear]:
    """The linear layers that are in FP8: those of attention and dense MLPs, not experts, their gate or lm_head."""
    for module in decoder.modules():
        if isinstance(module, Attention | Mlp):
            yield from (each for each in module.children() if isinstance(each, nn.Linear))


@torch.no_grad()
def round_to_fp8(decoder: TextDecoder) -> None:
    """Rounds the projections' weights to e4m3 with one scale for each output channel, and keeps their dtype."""
    for linear in projections(decoder):
        linear.weight.copy_(Fp8Weight.of(linear.weight).dequantized(linear.weight.dtype))
