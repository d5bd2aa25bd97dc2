"""Measures what FP8 does to a decoder's hidden states: `python -m benchmarks.fp8_accuracy` prints one Markdown table.

Dims of Qwen3-VL-8B's layers with random weights, one after the other, so that one layer's weights are in memory; all
else in float32, on the CPU. Cosines are the lowest of all tokens. Rows in FP8 are those of all four products.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.checkpoints import save_qwen3_vl_8b
from benchmarks.vit import draw_weights
from vitrine_vlm.gpu_kernels.fp8_weight import FP8, FP8_MAX, Fp8Weight
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.decoder import DecoderLayer, StepShared
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable, SequenceSlice, plan_attention
from vitrine_vlm.llm_worker.models.rank_group import OneRank
from vitrine_vlm.llm_worker.models.rotary import rotary_at
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

_BLOCK = 128
_PRINTED_EVERY = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36, help="layers to run; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the prompt; default: %(default)s")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = text_config(open_checkpoint(str(save_qwen3_vl_8b(Path(folder))), load_format="dummy"))
    torch.manual_seed(0)
    roundings = {"a channel": _by_channel, "a block": _by_block}
    names = [f"scales {each}{rows}" for each in roundings for rows in ("", ", rows too")]
    print(f"| behind layer | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    with torch.inference_mode():
        exact_TC = torch.randn(options.tokens, config.hidden_size)
        states = dict.fromkeys(names, exact_TC)
        shared = _shared(config, options.tokens)
        for index in range(options.layers):
            with torch.device("meta"):
                layer = DecoderLayer(config, index, OneRank())
            layer = layer.to_empty(device="cpu")
            draw_weights(layer)
            linears = [each for each in layer.modules() if isinstance(each, nn.Linear)]
            plain = [each.weight.data for each in linears]
            exact_TC = _run(layer, exact_TC, shared, config)
            for name, round_weight in roundings.items():
                for linear, weight in zip(linears, plain, strict=True):
                    linear.weight.data = round_weight(weight)
                weights_only, rows_too = (f"scales {name}{rows}" for rows in ("", ", rows too"))
                states[weights_only] = _run(layer, states[weights_only], shared, config)
                for linear in linears:
                    linear.register_forward_pre_hook(_round_rows)
                states[rows_too] = _run(layer, states[rows_too], shared, config)
                for linear in linears:
                    linear._forward_pre_hooks.clear()
            if (index + 1) % _PRINTED_EVERY == 0 or index == 0:
                cosines = [F.cosine_similarity(each, exact_TC, dim=1).min().item() for each in states.values()]
                print(f"| {index} | {' | '.join(f'{cosine:.5f}' for cosine in cosines)} |", flush=True)
    return 0


def _round_rows(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    return (_by_channel(inputs[0]),)


def _shared(config: TextConfig, num_tokens: int) -> StepShared:
    table = BlockTable([0])
    table.set_slots(num_tokens)
    return StepShared(
        rotary_at(torch.arange(num_tokens).expand(3, -1), config, torch.float32),
        plan_attention([SequenceSlice(0, num_tokens, num_tokens, table)], torch.device("cpu")),
        table.slots,
    )


def _run(layer: DecoderLayer, x_TC: torch.Tensor, shared: StepShared, config: TextConfig) -> torch.Tensor:
    cache = torch.zeros(2, len(x_TC), config.num_key_value_heads, config.head_dim)
    out_TC: torch.Tensor = layer(x_TC, shared, cache)
    return out_TC


def _by_channel(weight_OI: torch.Tensor) -> torch.Tensor:
    return Fp8Weight.of(weight_OI).dequantized(weight_OI.dtype)


def _by_block(weight_OI: torch.Tensor) -> torch.Tensor:
    blocks = weight_OI.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX
    rounded_OI: torch.Tensor = ((blocks / scale).to(FP8).float() * scale).flatten(2).flatten(0, 1)
    return rounded_OI


if __name__ == "__main__":
    sys.exit(main())
