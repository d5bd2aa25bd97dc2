"""A loaded tower on its way to the GPU path."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from encoder_service.gpu.attention import fastest_attention
from encoder_service.gpu.graphs import GpuTower
from encoder_service.gpu.layers import FusedTower
from encoder_service.gpu.qwen2_5_vl import FusedQwen2_5VL
from encoder_service.gpu.qwen3_vl import FusedQwen3VL
from encoder_service.models.qwen2_5_vl import Qwen2_5VLTower
from encoder_service.models.qwen3_vl import Qwen3VLTower

_log = logging.getLogger(__name__)


def gpu_tower(
    plain: Qwen3VLTower | Qwen2_5VLTower, max_graph_patches: int, on_progress: Callable[[int, int], None]
) -> GpuTower:
    """The same tower by fused kernels and CUDA graphs; seconds.

    Args:
        plain: bfloat16, on a GPU.
        max_graph_patches: the largest batch that gets a graph; 0 for none.
        on_progress: called with (graphs captured, graphs in all) after each.

    Raises:
        ValueError: an activation that has no fused form.
    """
    config = plain.config
    device = plain.patch_embed.proj.weight.device
    attention = fastest_attention(config.num_heads, config.head_dim, device, torch.bfloat16)
    fused: FusedTower
    fused = FusedQwen3VL(plain, attention) if isinstance(plain, Qwen3VLTower) else FusedQwen2_5VL(plain, attention)
    tower = GpuTower(fused, max_graph_patches, on_progress)
    stats = tower.stats()
    _log.info("%d CUDA graphs, %.2f GiB, %.1f s", stats.num_graphs, stats.graph_nbytes / 2**30, tower.capture_s)
    return tower
