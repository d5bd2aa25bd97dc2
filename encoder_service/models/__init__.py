"""Vision towers of our own: packed patches in, embedding rows out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from embedding_transport.checkpoint import Checkpoint, CheckpointError
from embedding_transport.dummy_weights import draw_dummy_weights
from encoder_service.models.config import qwen2_5_vl_config, qwen3_vl_config
from encoder_service.models.qwen2_5_vl import Qwen2_5VLTower
from encoder_service.models.qwen3_vl import Qwen3VLTower
from encoder_service.models.weights import load_visual_weights


class VisionTower(Protocol):
    """out_hidden_size: elements in the main embedding and in each deepstack layer; row_width: in a whole row.

    merge_unit: patches that become one token.
    """

    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    row_width: int
    merge_unit: int

    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        """Encodes images and videos side by side; none sees another.

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


def build_tower(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
) -> Qwen3VLTower | Qwen2_5VLTower:
    """The checkpoint's vision tower with its weights or dummies, a `VisionTower`; no language tensor is read.

    Raises:
        CheckpointError: a model type we have no tower for, or weights that do not match config.json.
    """
    config = checkpoint.config
    model_type = config["model_type"]
    tower: Qwen3VLTower | Qwen2_5VLTower
    with torch.device("meta"):
        if model_type in ("qwen3_vl", "qwen3_vl_moe"):
            tower = Qwen3VLTower(qwen3_vl_config(config))
        elif model_type == "qwen2_5_vl":
            tower = Qwen2_5VLTower(qwen2_5_vl_config(config))
        else:
            raise CheckpointError(
                f"model_type {model_type!r} has no vision tower here; supported are qwen3_vl, qwen3_vl_moe, qwen2_5_vl"
            )
    load = draw_dummy_weights if checkpoint.load_format == "dummy" else load_visual_weights
    load(tower, checkpoint, device, dtype, on_progress)
    return tower.eval()
