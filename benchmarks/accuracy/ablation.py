"""A copy of a checkpoint whose deepstack rows are all zero: it answers like a split that loses them."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

_WEIGHTS = "model.safetensors"
_LAST_LAYER = ("linear_fc2.weight", "linear_fc2.bias")


def without_deepstack(folder: Path, copy: Path) -> Path:
    """Writes the checkpoint in `folder` to `copy` with the last layer of every deepstack merger set to zero.

    Returns:
        `copy`.
    """
    shutil.copytree(folder, copy)
    tensors = load_file(folder / _WEIGHTS)
    for name, tensor in tensors.items():
        if "deepstack_merger_list" in name and name.endswith(_LAST_LAYER):
            tensor.zero_()
    save_file(tensors, copy / _WEIGHTS, metadata={"format": "pt"})
    return copy
