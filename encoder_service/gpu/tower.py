"""Makes a loaded tower's fused form and captures its graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from vitrine_vlm.encoder_service.gpu.accuracy import measure_accuracy
from vitrine_vlm.encoder_service.gpu.graphs import GpuTower, capture_buckets
from vitrine_vlm.encoder_service.gpu.layers import FusedTower
from vitrine_vlm.encoder_service.gpu.linear import BlockLinears
from vitrine_vlm.encoder_service.models.tower import PlainTower
from vitrine_vlm.gpu_kernels.packed_attention import PackedAttention, autotuned_attention

_log = logging.getLogger(__name__)
# Scales of single rows need a Hopper GPU.
_FIRST_WITH_FP8 = (9, 0)


def gpu_tower(
    plain: PlainTower,
    fuse: Callable[[PlainTower, PackedAttention, BlockLinears], FusedTower],
    max_graph_patches: int,
    on_progress: Callable[[int, int], None],
    *,
    fp8: bool = False,
) -> GpuTower:
    """The same tower as fused kernels and CUDA graphs, which takes seconds to make.

    Args:
        plain: bfloat16, on a GPU.
        fuse: makes its fused form, see `Family`.
        max_graph_patches: the largest batch that gets a graph; 0 for none.
        on_progress: called with (graphs captured, graphs in all) after each graph.
        fp8: whether the blocks' linear layers are in e4m3; the log then has the accuracy.

    Raises:
        ValueError: the activation has no fused form, or the GPU no e4m3.
    """
    config = plain.config
    device = plain.patch_embed.proj.weight.device
    if fp8 and torch.cuda.get_device_capability(device) < _FIRST_WITH_FP8:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no FP8 products: serve without --quantization fp8")
    attention = autotuned_attention(config.num_heads, config.head_dim, device, torch.bfloat16)
    linears = BlockLinears(
        fp8, tuple(dict.fromkeys(bucket.num_patches for bucket in capture_buckets(max_graph_patches)))
    )
    fused = fuse(plain, attention, linears)
    if fp8:
        _log.info("FP8, %s", measure_accuracy(plain, fused))
    tower = GpuTower(fused, max_graph_patches, on_progress)
    stats = tower.stats()
    _log.info("%d CUDA graphs, %.2f GiB, %.1f s", stats.num_graphs, stats.graph_nbytes / 2**30, tower.capture_s)
    return tower
