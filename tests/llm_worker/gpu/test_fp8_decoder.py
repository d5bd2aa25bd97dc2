"""Decoders whose weights stay in FP8, as fused kernels and in plain torch, against the same weights dequantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from tests.llm_worker.gpu.interpreted import run_few_programs
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.fp8_linear import Fp8Linear
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import (
    Family,
    Fp8Layout,
    save_fp8_checkpoint,
    save_random_checkpoint,
    small_config,
)

pytest.importorskip("triton", reason="Triton is not installed")
from tests.llm_worker.engine.harness import input_buffer, request_state
from vitrine_vlm.gpu_kernels import fp8, fp8_product
from vitrine_vlm.gpu_kernels.fp8 import Fp8Rows
from vitrine_vlm.gpu_kernels.fp8_gemm import MANY_ROWS
from vitrine_vlm.gpu_kernels.fp8_product import Tiled
from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.gpu_kernels.gated_silu import gated_silu
from vitrine_vlm.gpu_kernels.norms import add_rms_norm
from vitrine_vlm.gpu_kernels.packed_attention import TorchSdpa
from vitrine_vlm.gpu_kernels.skinny_gemm import SKINNY_ROWS
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.llm_worker.engine.runner import PlainRunner, Runner
from vitrine_vlm.llm_worker.gpu import fused_decoder
from vitrine_vlm.llm_worker.gpu.gpu_runner import GpuRunner

# In float32, which the kernels for a GPU accept, too.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS: dict[Family, Fp8Layout] = {"qwen3_vl": "block", "qwen2_5_vl": "channel", "qwen3_vl_moe": "channel"}


def blocky_config(family: Family) -> Qwen3VLConfig | Qwen3VLMoeConfig | Qwen2_5_VLConfig:
    """Two layers, in which blocks of 128 x 128 fit into every projection."""
    config = small_config(family)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 128, 256, 2
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 1, 1, 128
    text.rope_parameters["mrope_section"] = [24, 20, 20]
    if family == "qwen3_vl_moe":
        text.mlp_only_layers = [1]
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[:2]
    config.vision_config.out_hidden_size = 128
    return config


@pytest.fixture(scope="module", params=LAYOUTS)
def plain_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: Family = request.param
    return save_random_checkpoint(tmp_path_factory.mktemp(family), family, config=blocky_config(family))


@pytest.fixture
def fp8_folder(plain_folder: Path, tmp_path: Path) -> Path:
    model_type = json.loads((plain_folder / "config.json").read_text())["model_type"]
    return save_fp8_checkpoint(plain_folder, tmp_path / "fp8", LAYOUTS[model_type])


def load(folder: Path, *, keep_fp8: bool, quantize: bool = False) -> TextDecoder:
    checkpoint = open_checkpoint(str(folder))
    return build_decoder(checkpoint, DEVICE, torch.float32, quantization="fp8" if quantize else None, keep_fp8=keep_fp8)


def in_fp8(decoder: TextDecoder) -> set[str]:
    return {name.split(".", 2)[2] for name, module in decoder.named_modules() if isinstance(module, Fp8Linear)}


def hidden_states(decoder: TextDecoder, *, gpu: bool, kv_dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A prompt in two chunks, beside another's; then tokens of both, and of one."""
    kv_cache = KvCache(decoder.config, 16, 16, DEVICE, kv_dtype)
    buffer = input_buffer(decoder, 16)
    runner: Runner = PlainRunner(decoder, kv_cache, buffer)
    if gpu:
        runner = GpuRunner(decoder, kv_cache, buffer, 4, 64, TorchSdpa(), capture=lambda work: work, max_short_step=8)
    sequences = []
    for seed in range(2):
        ids = torch.randint(300, (14,), generator=torch.Generator().manual_seed(seed)).tolist()
        sequence = request_state(ExpandedPrompt(ids, torch.arange(14).expand(3, -1), 14))
        sequence.token_ids += [5, 6]
        kv_cache.append_slots(sequence.table, len(sequence.token_ids))
        sequences.append(sequence)
    one, other = sequences
    found = []
    for chunks in (
        [Chunk(one, 0, 6, False)],
        [Chunk(one, 6, 14, True), Chunk(other, 0, 5, False)],
        [Chunk(one, 14, 15, True), Chunk(other, 5, 14, True)],
        [Chunk(one, 15, 16, True), Chunk(other, 14, 15, True)],
        [Chunk(other, 15, 16, True)],
    ):
        prepared = buffer.write(chunks)
        assert not prepared.failed
        found.append(runner(prepared.inputs).clone())
    return found


@torch.inference_mode()
def test_weights_stay_in_fp8(fp8_folder: Path) -> None:
    kept, dequantized = load(fp8_folder, keep_fp8=True), load(fp8_folder, keep_fp8=False)
    assert not in_fp8(dequantized)
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert in_fp8(kept) == attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert kept.get_parameter("layers.1.self_attn.q_proj.weight").dtype == torch.float8_e4m3fn
    assert not any(parameter.is_meta for parameter in kept.parameters())
    for ours, expected in zip(hidden_states(kept, gpu=False), hidden_states(dequantized, gpu=False), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def multiply_without_measuring(patch: pytest.MonkeyPatch) -> None:
    """Multiplies on a GPU as on a CPU: by the first implementation, which keeps few rows in float32.

    To measure them, all would be compiled for each product, and the fastest may have rows in FP8.
    `test_all_implementations_at_true_dims` has them all.
    """
    tuned = fp8_product._tuned.__wrapped__
    patch.setattr(fp8_product, "_tuned", lambda *arguments: tuned(*arguments[:-1], ()))


@torch.inference_mode()
def test_few_rows_keep_their_precision(fp8_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        run_few_programs(monkeypatch)
    multiply_without_measuring(monkeypatch)
    decoder = load(fp8_folder, keep_fp8=True)
    plain = hidden_states(load(fp8_folder, keep_fp8=False), gpu=False)
    for step, (ours, expected) in enumerate(zip(hidden_states(decoder, gpu=True), plain, strict=True)):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4, msg=f"step {step}: {{}}".format)
    # Its weights lie elsewhere now, and are the same.
    for ours, expected in zip(hidden_states(decoder, gpu=False), plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows as they are in FP8, each with a scale of its own."""
    return Fp8Weight.of(x).dequantized(x.dtype)


def rows_in_fp8(x: torch.Tensor) -> Fp8Rows:
    weight = Fp8Weight.of(x)
    return Fp8Rows(weight.values, weight.scale)


def quantize_in_torch(patch: pytest.MonkeyPatch) -> None:
    """Quantizes rows in torch, as Triton's interpreter halves values that should round up to a power of two."""

    def norm(*arguments: Any, fp8: bool = False) -> Any:
        normed = add_rms_norm(*arguments)
        assert isinstance(normed, torch.Tensor)
        return rows_in_fp8(normed) if fp8 else normed

    patch.setattr(fused_decoder, "add_rms_norm", norm)
    patch.setattr(fp8, "quantized", rows_in_fp8)
    patch.setattr(fp8, "quantized_gated_silu", lambda gate_up: rows_in_fp8(gated_silu(gate_up)))


@torch.inference_mode()
def test_many_rows_are_quantized(fp8_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        run_few_programs(monkeypatch)
        quantize_in_torch(monkeypatch)
    monkeypatch.setattr(fp8_product, "_MOST_FEW_ROWS", 0)
    # torch's own product rounds to bfloat16, which moves one in fifty values of the next rows by a step of e4m3.
    monkeypatch.setattr(fp8_product, "ScaledMm", lambda dtype: Tiled(MANY_ROWS[0], True, dtype))
    monkeypatch.setattr(fp8_product, "_tuned", fp8_product._tuned.__wrapped__)
    found = hidden_states(load(fp8_folder, keep_fp8=True), gpu=True)
    dequantized = hidden_states(load(fp8_folder, keep_fp8=False), gpu=False)
    linear = Fp8Linear.forward
    monkeypatch.setattr(Fp8Linear, "forward", lambda self, x: linear(self, x if len(x) in SKINNY_ROWS else rounded(x)))
    expected = hidden_states(load(fp8_folder, keep_fp8=True), gpu=False)
    # Steps are padded to sizes that are captured: none has as few rows as skinny GEMMs take, except for single tokens.
    for step, (ours, right, exact) in enumerate(zip(found, expected, dequantized, strict=True)):
        cosine, without = (F.cosine_similarity(each, right, dim=1).min() for each in (ours, exact))
        print(f"step {step}: cosine {cosine:.6f}, without quantizing rows {without:.6f}")
        # Tensor cores sum FP8 in fewer bits, and what follows rounds to another step of e4m3 now and then.
        assert cosine > (0.9999 if DEVICE.type == "cpu" else 0.99), f"step {step}"
        if step < 3:
            assert without < 0.999, "these rows are quantized"


@torch.inference_mode()
def test_quantized_at_load(plain_folder: Path) -> None:
    kept, rounded = (load(plain_folder, keep_fp8=keep, quantize=True) for keep in (True, False))
    assert in_fp8(kept) and not in_fp8(rounded)
    for ours, expected in zip(hidden_states(kept, gpu=False), hidden_states(rounded, gpu=False), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_blocks_that_the_kernels_cannot_take_are_dequantized(plain_folder: Path, tmp_path: Path) -> None:
    folder = save_fp8_checkpoint(plain_folder, tmp_path, "block", block=(64, 64))
    kept, dequantized = load(folder, keep_fp8=True), load(folder, keep_fp8=False)
    assert not in_fp8(kept)
    expected = dequantized.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.state_dict().items())
