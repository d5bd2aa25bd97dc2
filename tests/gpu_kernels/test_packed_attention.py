"""Packed attention against softmax written out: torch's on a CPU, all that is installed on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from vitrine_vlm.gpu_kernels.packed_attention import Bounds, FlashAttention4, PackedAttention, TorchSdpa, TorchVarlen

HEADS, KV_HEADS = 4, 2
QUERIES, KEYS = [5, 1, 20], [5, 9, 33]
GPU = pytest.mark.gpu


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def softmax_attention(
    q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, queries: list[int], keys: list[int], causal: bool
) -> torch.Tensor:
    outputs = []
    for q, k, v in zip(q_THD.split(queries), k_LKD.split(keys), v_LKD.split(keys), strict=True):
        k, v = (each.repeat_interleave(HEADS // each.shape[1], dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if causal:
            last_seen = torch.arange(len(q))[:, None] + len(k) - len(q)
            scores = scores.masked_fill(torch.arange(len(k)) > last_seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def bounds(queries: list[int], keys: list[int], device: str) -> Bounds:
    cu_queries, cu_keys = (torch.tensor([0, *each], device=device).cumsum(0).int() for each in (queries, keys))
    return Bounds(cu_queries, cu_keys, max(queries), max(keys))


@pytest.mark.parametrize("causal", [False, True])
def test_torch_sdpa(causal: bool) -> None:
    q, (k, v) = random(sum(QUERIES), HEADS, 16), random(2, sum(KEYS), KV_HEADS, 16).unbind()
    found = TorchSdpa()(q, k, v, bounds(QUERIES, KEYS, "cpu"), scale=16**-0.5, causal=causal)
    torch.testing.assert_close(found, softmax_attention(q, k, v, QUERIES, KEYS, causal))


@GPU
@pytest.mark.parametrize("attention_type", [FlashAttention4, TorchVarlen])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [72, 128])
def test_the_libraries(attention_type: type[FlashAttention4] | type[TorchVarlen], causal: bool, head_dim: int) -> None:
    """A decoder's chunks are causal, and heads share keys; libraries pad a tower's heads of 72 differently."""
    if attention_type is FlashAttention4:
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    attention: PackedAttention = attention_type()
    queries, keys, kv_heads = (QUERIES, KEYS, KV_HEADS) if causal else (KEYS, KEYS, HEADS)
    q, (k, v) = random(sum(queries), HEADS, head_dim), random(2, sum(keys), kv_heads, head_dim).unbind()
    padding = (0, attention.padded_head_dim(head_dim) - head_dim)
    q_padded, k_padded, v_gpu = (each.to("cuda", torch.bfloat16) for each in (F.pad(q, padding), F.pad(k, padding), v))
    with_empty = bounds([*queries, 0], [*keys, 0], "cuda")
    found = attention(q_padded, k_padded, v_gpu, with_empty, scale=head_dim**-0.5, causal=causal)
    expected = softmax_attention(q, k, v, queries, keys, causal)
    assert F.cosine_similarity(found.float().cpu(), expected, dim=-1).min() > 0.999
