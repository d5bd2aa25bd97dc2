"""Measures how far a fused tower is from the plain one in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vitrine_vlm.encoder_service.gpu.batch_tables import BatchTables, Layouts
from vitrine_vlm.encoder_service.gpu.layers import FusedTower
from vitrine_vlm.encoder_service.models.grids import GridTHW
from vitrine_vlm.encoder_service.models.tower import PlainTower

_GRIDS = ((1, 24, 32), (1, 16, 16))


@dataclass(frozen=True)
class Accuracy:
    """Cosine similarities to float32, each the lowest of all patches or tokens.

    layers: of the residual stream behind each block. rows: of the main embeddings, then of each deepstack layer's.
    """

    layers: tuple[float, ...]
    rows: tuple[float, ...]

    def __str__(self) -> str:
        main, *deepstack = (f"{each:.5f}" for each in self.rows)
        parts = [f"main rows {main}", *(["deepstack rows " + ", ".join(deepstack)] if deepstack else [])]
        layers = ", ".join(f"{index}: {each:.5f}" for index, each in enumerate(self.layers))
        return f"lowest cosine to float32: {'; '.join(parts)}; behind block {layers}"


@torch.inference_mode()
def measure_accuracy(plain: PlainTower, fused: FusedTower, grid_thw: Sequence[GridTHW] = _GRIDS) -> Accuracy:
    """Runs both towers on noise, which takes a second and memory for the weights in float32."""
    grids = list(grid_thw)
    layouts = Layouts(grids, fused.merge_size, fused.window_tokens)
    table = torch.tensor(layouts.values(layouts.shape), dtype=torch.int32, device=fused.device)
    noise = torch.randn((layouts.num_patches, fused.patch_width), generator=torch.Generator().manual_seed(0))
    patches_PX = noise.clamp(-2, 2).to(fused.device, fused.dtype)
    rows_TW = patches_PX.new_empty((layouts.num_patches // fused.merge_unit, fused.row_width))
    fused_layers: list[torch.Tensor] = []
    fused.run(patches_PX, BatchTables.of(table, layouts.shape), rows_TW, fused_layers.append)

    reference = copy.deepcopy(plain).float()
    plain_layers: list[torch.Tensor] = []
    for block in reference.blocks:
        block.register_forward_hook(lambda module, inputs, x_PC: plain_layers.append(x_PC.clone()))
    expected_TW = reference.forward(patches_PX.float(), grids)

    width = fused.out_hidden_size
    rows = _cosine(rows_TW.unflatten(1, (-1, width)), expected_TW.unflatten(1, (-1, width)))
    layers = (_cosine(one, other).min().item() for one, other in zip(fused_layers, plain_layers, strict=True))
    return Accuracy(tuple(layers), tuple(rows.amin(0).tolist()))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(one.float(), other.float(), dim=-1)
