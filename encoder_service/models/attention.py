"""Attention over packed sequences: images side by side without padding, each attending only to itself.

Shapes: P patches of all images, H heads, D head dim, S equally long segments in a row, L their length.
"""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F


def packed_attention(
    q_PHD: torch.Tensor,
    k_PHD: torch.Tensor,
    v_PHD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """Softmax attention within each segment, scaled by D ** -0.5.

    Args:
        q_PHD, k_PHD, v_PHD: [P, H, D], one dtype and device.
        cu_seqlens: [num_segments + 1] int32 on the CPU, ascending from 0 to P. It stays on the CPU because segment
            lengths shape the launches: reading them from the device would stall it in every layer.
        max_seqlen: length of the longest segment.

    Returns:
        [P, H, D], contiguous.
    """
    num_patches, num_heads, head_dim = q_PHD.shape
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    assert bounds[-1] == num_patches and max(lengths) == max_seqlen, "segments do not cover the packed patches"
    out_PHD = torch.empty_like(q_PHD, memory_format=torch.contiguous_format)
    start = 0
    # Neighbours of equal length (the frames of a video, the windows of an image) form a batch without a copy.
    for length, run in groupby(lengths):
        stop = start + length * len(list(run))
        q_SHLD, k_SHLD, v_SHLD = (
            packed[start:stop].view(-1, length, num_heads, head_dim).transpose(1, 2) for packed in (q_PHD, k_PHD, v_PHD)
        )
        out_SHLD = F.scaled_dot_product_attention(q_SHLD, k_SHLD, v_SHLD)
        out_PHD[start:stop].view(-1, length, num_heads, head_dim).copy_(out_SHLD.transpose(1, 2))
        start = stop
    return out_PHD
