"""Compiles every Triton kernel of the project for a Hopper GPU, which needs no GPU.

Kernels are compiled as their host functions launch them, with tensors that have no memory, in the services' dtypes.
Sizes are small, as larger ones take longer and have the same types. Triton's interpreter, in which other tests run
kernels, does not check types as its compiler does.

It is a program, run by test_compilation.py, as a process either interprets or compiles Triton's kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vitrine_vlm
from vitrine_vlm.embedding_transport.receiving.land_rows import land_rows
from vitrine_vlm.encoder_service.gpu import kernels
from vitrine_vlm.gpu_kernels import fp8, norms, rotary, skinny_gemm
from vitrine_vlm.gpu_kernels.fp8_gemm import FEW_ROWS, MANY_ROWS, fp8_gemm
from vitrine_vlm.gpu_kernels.fp8_weight import FP8, Fp8Weight
from vitrine_vlm.gpu_kernels.gated_silu import gated_silu
from vitrine_vlm.gpu_kernels.kv_row_copies import gather_rows, scatter_rows
from vitrine_vlm.llm_worker.gpu.step_tables import StepTables, Tiles
from vitrine_vlm.llm_worker.gpu.tile_attention import tile_attention

BF16, FP32, INT32, INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
META = torch.device("meta")
NUM_TOKENS = 16
# Of a decoder.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE = 8, 2, 128, 1024
# Of a tower.
NUM_TOWER_HEADS, TOWER_HEAD_DIM, TOWER_HIDDEN_SIZE = 4, 72, 288


class Hopper:
    """Triton's driver, as far as its compiler needs one."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def fp8_weight(outputs: int, inputs: int, *, blocks: bool) -> Fp8Weight:
    values = empty(outputs, inputs, dtype=FP8)
    if blocks:
        return Fp8Weight(values, empty(outputs // 128, inputs // 128, dtype=FP32), (128, 128))
    return Fp8Weight(values, empty(outputs, 1, dtype=FP32), (1, inputs))


def compile_rows() -> None:
    land_rows(empty(NUM_TOKENS, 4 * HIDDEN_SIZE), empty(NUM_TOKENS, HIDDEN_SIZE), empty(3, NUM_TOKENS, HIDDEN_SIZE))
    gate_up = empty(NUM_TOKENS, 2 * HIDDEN_SIZE)
    gated_silu(gate_up)
    fp8.quantized(gate_up)
    fp8.quantized_gelu_tanh(gate_up)
    fp8.quantized_gated_silu(gate_up)


def compile_tower() -> None:
    mean_C, std_C = empty(3, dtype=FP32), empty(3, dtype=FP32)
    for dtype in (torch.uint8, FP32):
        kernels.image_patches(empty(3, 64, 64, dtype=dtype), mean_C, std_C, 4, 2, 2, BF16)
    cu_seqlens, places = empty(9, dtype=INT32), empty(NUM_TOKENS, kernels.PLACE_WIDTH, dtype=INT32)
    kernels.place_patches(cu_seqlens, empty(8, 2, dtype=INT32), 2, 4, places)
    kernels.add_position_embeddings(empty(NUM_TOKENS, TOWER_HIDDEN_SIZE), empty(48 * 48, TOWER_HIDDEN_SIZE), places, 48)
    half = TOWER_HEAD_DIM // 2
    cos_sin = empty(NUM_TOKENS, 2, half, dtype=FP32)
    rotary.rope_table(places[:, :2].T, empty(half, dtype=FP32), empty(half, dtype=INT32), cos_sin)
    q, k, v = rotary.apply_rope(empty(NUM_TOKENS, 3 * TOWER_HIDDEN_SIZE), cos_sin, NUM_TOWER_HEADS, 80)
    kernels.window_attention(q, k, v, cu_seqlens, 16, TOWER_HEAD_DIM**-0.5)


def compile_norms() -> None:
    x, weight = empty(NUM_TOKENS, HIDDEN_SIZE), empty(HIDDEN_SIZE)
    norms.add_rms_norm(x, (), weight, 1e-6)
    norms.add_rms_norm(x, (x, x), weight, 1e-6, fp8=True)
    x, weight, shift = (
        empty(NUM_TOKENS, TOWER_HIDDEN_SIZE),
        empty(TOWER_HIDDEN_SIZE),
        empty(TOWER_HIDDEN_SIZE, dtype=FP32),
    )
    cu_seqlens = empty(9, dtype=INT32)
    norms.add_shifted_norm(x, None, shift, weight, weight, cu_seqlens, 1e-6)
    norms.add_shifted_norm(x, x, shift, weight, None, cu_seqlens, 1e-6, fp8=True)


def compile_skinny_gemms() -> None:
    num_outputs = 2 * HIDDEN_SIZE
    in_bf16 = empty(num_outputs, HIDDEN_SIZE)
    in_channels, in_blocks = (fp8_weight(num_outputs, HIDDEN_SIZE, blocks=blocks) for blocks in (False, True))
    for num_rows, weight in ((1, in_bf16), (2, in_channels), (4, in_blocks)):
        skinny_gemm.skinny_gated_silu(empty(num_rows, HIDDEN_SIZE), weight)
    skinny_gemm.skinny_linear(empty(4, HIDDEN_SIZE), in_channels, empty(num_outputs))
    skinny_gemm.skinny_linear_add(empty(1, HIDDEN_SIZE), in_blocks, empty(1, num_outputs))


def compile_fp8_gemms() -> None:
    in_channels, in_blocks = (fp8_weight(HIDDEN_SIZE, HIDDEN_SIZE, blocks=blocks) for blocks in (False, True))
    x, bias, (in_half, *_, in_parts) = empty(NUM_TOKENS, HIDDEN_SIZE), empty(HIDDEN_SIZE), FEW_ROWS
    fp8_gemm(in_half, x, in_channels, bias)
    fp8_gemm(in_half, x, in_blocks)
    fp8_gemm(in_parts, x, in_channels)
    fp8_gemm(in_parts, x, in_blocks, bias)
    rows_in_fp8 = fp8.Fp8Rows.empty(NUM_TOKENS, HIDDEN_SIZE, META)
    fp8_gemm(MANY_ROWS[0], rows_in_fp8, in_channels, bias)
    fp8_gemm(MANY_ROWS[0], rows_in_fp8, in_blocks)


def compile_decoder(kv_dtype: torch.dtype) -> None:
    k_cache = v_cache = empty(4096, NUM_KV_HEADS, HEAD_DIM, dtype=kv_dtype)
    half, q = HEAD_DIM // 2, empty(NUM_TOKENS, NUM_HEADS, HEAD_DIM)
    cos_sin, positions = empty(NUM_TOKENS, 2, half), empty(3, NUM_TOKENS, dtype=INT64)
    rotary.rope_table(positions, empty(half, dtype=FP32), empty(half, dtype=INT32), cos_sin)
    qkv = empty(NUM_TOKENS, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    slots, scales = empty(NUM_TOKENS, dtype=INT64), (0.5, 2.0)
    for norm_weight in (empty(HEAD_DIM), None):
        rotary.rope_and_store_kv(qkv, cos_sin, norm_weight, norm_weight, 1e-6, slots, k_cache, v_cache, q, scales)
    layers, rows = empty(4, 2, 64, NUM_KV_HEADS, HEAD_DIM, dtype=kv_dtype), empty(NUM_TOKENS, 2048, dtype=kv_dtype)
    gather_rows(layers, slots, rows)
    scatter_rows(rows, slots, layers)
    tiles = Tiles(1, NUM_TOKENS, NUM_KV_HEADS, META)
    tables = StepTables(tiles, tiles, NUM_TOKENS, 256, 16, META)
    tile_attention(q, k_cache, v_cache, tables, tiles, NUM_TOKENS, 4, torch.empty_like(q), scales)


CASES: tuple[Callable[[], None], ...] = (
    compile_rows,
    compile_tower,
    compile_norms,
    compile_skinny_gemms,
    compile_fp8_gemms,
    functools.partial(compile_decoder, BF16),
    functools.partial(compile_decoder, FP8),
)


def modules_with_kernels() -> Iterator[ModuleType]:
    (package,) = vitrine_vlm.__path__
    for folder, _, files in os.walk(package, followlinks=True):
        for path in (Path(folder, file) for file in files):
            if path.suffix == ".py" and "import triton" in path.read_text():
                name = ".".join(path.relative_to(package).with_suffix("").parts)
                yield importlib.import_module(f"vitrine_vlm.{name}")


def called_kernels(kernel: Any) -> Iterator[Any]:
    """The kernel, and all that it calls."""
    yield kernel
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, JITFunction) and called is not kernel:
            yield from called_kernels(called)


def main() -> int:
    compiled: set[Any] = set()

    def compile_only(kernel: Any, grid: Any) -> Callable[..., object]:
        compiled.add(kernel)
        return functools.partial(kernel.warmup, grid=grid)

    JITFunction.__getitem__ = compile_only
    driver.set_active(Hopper())
    found: set[Any] = set()
    for module in modules_with_kernels():
        found |= {each for each in vars(module).values() if isinstance(each, JITFunction)}
        if "has_dependent_launch" in vars(module):
            vars(module)["has_dependent_launch"] = lambda device: True
    failed = 0
    for case in CASES:
        try:
            case()
        except Exception:  # the other cases are compiled nevertheless
            failed += 1
            traceback.print_exc()
    covered = {each for kernel in compiled for each in called_kernels(kernel)}
    for kernel in found - covered:
        print(f"{kernel.fn.__module__}.{kernel.fn.__name__} is in no case: add one that launches it")
    print(f"{len(found & covered)} kernels compiled")
    return 1 if failed or found - covered else 0


if __name__ == "__main__":
    sys.exit(main())
