"""Which of a decoder's linear layers are in FP8, and how they get there.

A GPU with FP8 products keeps their weights as they are; elsewhere they are dequantized at load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.llm_worker.models.decoder import Attention, Mlp, TextDecoder
from vitrine_vlm.llm_worker.models.fp8_linear import Fp8Linear

# Blocks that the kernels take, if no weight ends inside one; widths of weights with scales a channel are in multiples
# of what one load reads.
_KERNELS_BLOCK, _KERNELS_WIDTH = (128, 128), 16
_MULTIPLIED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
# The first compute capability that has FP8.
FIRST_WITH_FP8 = (8, 9)


def has_fp8_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights in FP8 are multiplied as they are, with rows of this dtype."""
    return (
        device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= FIRST_WITH_FP8
    )


def projection_weights(decoder: TextDecoder) -> frozenset[str]:
    """The names of the weights that may stay in FP8."""
    modules = {module: name for name, module in decoder.named_modules()}
    return frozenset(
        f"{modules[module]}.{name}.weight"
        for module in _modules(decoder)
        for name, linear in module.named_children()
        if isinstance(linear, nn.Linear)
    )


def quantize(decoder: TextDecoder, *, keep: bool) -> None:
    """Quantizes the projections with one scale for each output channel.

    Args:
        keep: whether the weights stay in FP8; otherwise they are rounded to it and keep their dtype.
    """
    for module in _modules(decoder):
        linears = {name: each for name, each in module.named_children() if isinstance(each, nn.Linear)}
        weights = {name: Fp8Weight.of(each.weight.data) for name, each in linears.items()}
        kept = keep and all(map(_fits_kernels, weights.values()))
        for name, linear in linears.items():
            if kept:
                setattr(module, name, Fp8Linear(weights[name], linear.bias))
            else:
                linear.weight.data.copy_(weights[name].dequantized(linear.weight.dtype))


def set_fp8_weights(decoder: TextDecoder, weights: Mapping[str, Fp8Weight], dtype: torch.dtype) -> None:
    """Puts weights that came in FP8 in place of linear layers' own: as they are where the kernels can take all that are
    multiplied together, and dequantized otherwise.

    Args:
        weights: by the names of the decoder's parameters.
    """
    names = {module: name for name, module in decoder.named_modules()}
    for module in _modules(decoder):
        for group in _MULTIPLIED_TOGETHER:
            linears = {name: getattr(module, name) for name in group if hasattr(module, name)}
            found = {name: weights.get(f"{names[module]}.{name}.weight") for name in linears}
            kept = all(weight is not None and _fits_kernels(weight) for weight in found.values())
            for name, weight in found.items():
                if weight is not None and kept:
                    setattr(module, name, Fp8Linear(weight, linears[name].bias))
                elif weight is not None:
                    linears[name].weight = nn.Parameter(weight.dequantized(dtype), requires_grad=False)


def _modules(decoder: TextDecoder) -> Iterator[Attention | Mlp]:
    """The modules whose linear layers may be in FP8, not experts, their gate or lm_head."""
    return (module for module in decoder.modules() if isinstance(module, Attention | Mlp))


def _fits_kernels(weight: Fp8Weight) -> bool:
    outputs, inputs = weight.values.shape
    if weight.is_per_channel:
        return outputs % _KERNELS_WIDTH == 0 and inputs % _KERNELS_WIDTH == 0
    return weight.block == _KERNELS_BLOCK and outputs % weight.block[0] == 0 and inputs % weight.block[1] == 0
