"""The interface of every vision tower, and the base class of the plain ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import nn

from vitrine_vlm.encoder_service.models.config import VisionConfig
from vitrine_vlm.encoder_service.models.layers import PatchEmbed


class VisionTower(Protocol):
    """Turns patches into embedding rows.

    out_hidden_size: elements in the main embedding and in each deepstack layer. row_width: elements in a whole row.
    merge_unit: patches that become one token.
    """

    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    row_width: int
    merge_unit: int

    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        """Encodes images and videos side by side; each attends only to itself.

        Args:
            patches_PX: normalized patch rows of all items in order, merge-block order within an item,
                [sum of t * h * w, channels * temporal_patch_size * patch_size ** 2], any float dtype and device.
            grid_thw: patches of each item along time, height and width.

        Returns:
            Rows [num_tokens of all items, row_width] in the tower's dtype, on its device: main embedding, then the
            deepstack layers in the order of deepstack_visual_indexes. Freshly allocated: the caller owns it.

        Raises:
            ValueError: patches and grids do not belong together.
        """
        ...


class PlainTower(nn.Module, ABC):
    """A `VisionTower` in plain torch. It runs on a CPU, and its fused form on a GPU shares its weights.

    Its parameter names are those of `VisualWeights`. blocks: one `Block` a layer.
    """

    config: VisionConfig
    blocks: nn.ModuleList

    def __init__(
        self, config: VisionConfig, *, patch_bias: bool, deepstack_visual_indexes: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.deepstack_visual_indexes = deepstack_visual_indexes
        self.out_hidden_size = config.out_hidden_size
        self.row_width = config.out_hidden_size * (1 + len(deepstack_visual_indexes))
        self.merge_unit = config.merge_unit
        self.patch_embed = PatchEmbed(config, bias=patch_bias)

    @abstractmethod
    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        """See `VisionTower.forward`."""
