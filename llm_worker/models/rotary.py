"""Multimodal rotary embedding: each frequency rotates with the time, row or column position.

Shapes: T tokens, H heads, D head dim, F frequencies (D / 2).

Source: arXiv 2409.12191, section 2.1; the text rotary embeddings of transformers 5.23's models that the families name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vitrine_vlm.llm_worker.models.config import TextConfig


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of every token of a step, in the model's dtype."""

    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor

    def apply_rope(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Rotates queries or keys."""
        left, right = x_THD.chunk(2, dim=-1)
        return x_THD * self.cos_T1D + torch.cat([-right, left], dim=-1) * self.sin_T1D


def axis_of_frequency(config: TextConfig) -> torch.Tensor:
    """The position axis (0 time, 1 row, 2 column) that each frequency rotates with, [F] int64."""
    section = config.mrope_section
    if not config.mrope_interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    axis = torch.zeros(config.head_dim // 2, dtype=torch.int64)
    for which in (1, 2):
        axis[which : section[which] * 3 : 3] = which
    return axis


def rotary_at(positions_3T: torch.Tensor, config: TextConfig, dtype: torch.dtype) -> Rotary:
    """Computes the rotation at these positions: angles in float32, cos and sin in `dtype`."""
    device = positions_3T.device
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies_F = 1.0 / config.rope_theta**exponents
    positions_TF = positions_3T.float()[axis_of_frequency(config).to(device)].T
    angles_T1D = (positions_TF * frequencies_F).repeat(1, 2)[:, None]
    return Rotary(angles_T1D.cos().to(dtype), angles_T1D.sin().to(dtype))
