"""Mixture of experts in plain torch: each expert runs once over the tokens routed to it.

Shapes: T tokens, C hidden size, E experts, K experts a token, I expert's intermediate size.

Source: the sparse MoE blocks of transformers 5.23's models that the families name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vitrine_vlm.llm_worker.models.config import MoeConfig


class Experts(nn.Module):
    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        intermediate = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * intermediate, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, intermediate))


class SparseMoe(nn.Module):
    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.experts = Experts(hidden_size, config)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        probabilities_TE = self.gate(x_TC).softmax(-1, dtype=torch.float32)
        weights_TK, chosen_TK = probabilities_TE.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK.to(x_TC.dtype)
        out_TC = torch.zeros_like(x_TC)
        for expert in chosen_TK.unique().tolist():
            tokens, rank = torch.where(chosen_TK == expert)
            gate, up = F.linear(x_TC[tokens], self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            answer = F.linear(F.silu(gate) * up, self.experts.down_proj[expert])
            out_TC.index_add_(0, tokens, answer * weights_TK[tokens, rank, None])
        return out_TC
