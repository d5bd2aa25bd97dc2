"""The GPU runner with a KV cache in FP8, against the plain one; without a GPU kernels run in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.llm_worker.gpu.interpreted import run_few_programs
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import DecoderLayer
from vitrine_vlm.llm_worker.models.kv_slots import KvScales, write_slots
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint

pytest.importorskip("triton", reason="Triton is not installed")
from tests.llm_worker.gpu.test_fp8_decoder import DEVICE, blocky_config, hidden_states
from vitrine_vlm.gpu_kernels.rotary import rope_and_store_kv
from vitrine_vlm.llm_worker.gpu import fused_decoder

FP8 = torch.float8_e4m3fn


def round_in_torch(patch: pytest.MonkeyPatch) -> None:
    """Rounds to e4m3 in torch, as Triton's interpreter halves values that should round up to a power of two."""

    def store(
        qkv_TX: torch.Tensor,
        cos_sin_T2F: torch.Tensor,
        q_weight_D: torch.Tensor | None,
        k_weight_D: torch.Tensor | None,
        eps: float,
        slots_T: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        q_THD: torch.Tensor,
        kv_scales: KvScales,
    ) -> None:
        k_SKD, v_SKD = torch.zeros(2, *k_cache_SKD.shape).unbind()
        rope_and_store_kv(qkv_TX, cos_sin_T2F, q_weight_D, k_weight_D, eps, slots_T, k_SKD, v_SKD, q_THD)
        kept = slots_T[slots_T >= 0]
        write_slots(k_cache_SKD, kept, k_SKD[kept], kv_scales.k)
        write_slots(v_cache_SKD, kept, v_SKD[kept], kv_scales.v)

    patch.setattr(fused_decoder, "rope_and_store_kv", store)


@torch.inference_mode()
def test_it_is_close_to_a_plain_cache_and_equals_the_PlainRunners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        run_few_programs(monkeypatch)
        round_in_torch(monkeypatch)
    folder = save_random_checkpoint(tmp_path, "qwen3_vl", config=blocky_config("qwen3_vl"))
    decoder = build_decoder(open_checkpoint(str(folder)), DEVICE, torch.float32)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.kv_scales = KvScales(0.25, 0.0625)
    exact = hidden_states(decoder, gpu=False)
    plain, ours = (hidden_states(decoder, gpu=gpu, kv_dtype=FP8) for gpu in (False, True))
    for step in range(len(exact)):
        # In the mean, as a token of a random model may depend on two keys that are nearly as good.
        to_exact = F.cosine_similarity(ours[step], exact[step], dim=1).mean()
        to_plain = F.cosine_similarity(ours[step], plain[step], dim=1).min()
        print(f"step {step}: cosine to a plain cache {to_exact:.6f}, to the PlainRunner {to_plain:.6f}")
        assert 0.98 < to_exact < 0.99999, f"step {step}"
        # A value between two of e4m3's may be rounded to the other one.
        assert to_plain > 0.9999, f"step {step}"
