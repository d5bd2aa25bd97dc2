"""Loads a tower's weights from a checkpoint: the visual tensors, all of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from embedding_transport.checkpoint import Checkpoint, CheckpointError
from embedding_transport.dummy_weights import configured_dtype

# The older layout of released checkpoints and the newer one.
_PREFIXES = ("visual.", "model.visual.")


def load_visual_weights(
    tower: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
) -> None:
    """Fills `tower`, built on the meta device, with the checkpoint's visual tensors.

    Args:
        tower: its parameter names are the checkpoint's, less the prefix.
        device, dtype: where the weights go and what they become.
        on_progress: called with (tensors loaded, tensors in all) after each.

    Raises:
        CheckpointError: a tensor is missing, is left over, or has another shape.
    """
    expected = tower.state_dict()
    names = {_without_prefix(name): name for name in _visual_names(checkpoint)}
    missing, unexpected = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"visual tensors of {checkpoint.folder} do not match its config.json: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    loaded: dict[str, torch.Tensor] = {}
    for full_name, tensor in checkpoint.read_tensors(list(names.values())):
        name = _without_prefix(full_name)
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{full_name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
            )
        loaded[name] = tensor.to(device, dtype)
        on_progress(len(loaded), len(expected))
    tower.load_state_dict(loaded, strict=True, assign=True)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Element type of the visual weights on disk, read from one tensor; of dummies what config.json says.

    Raises:
        CheckpointError: no visual tensors.
    """
    if checkpoint.load_format == "dummy":
        return configured_dtype(checkpoint)
    return next(checkpoint.read_tensors(_visual_names(checkpoint)[:1]))[1].dtype


def _visual_names(checkpoint: Checkpoint) -> list[str]:
    names = [name for name in checkpoint.tensor_names() if name.startswith(_PREFIXES)]
    if not names:
        raise CheckpointError(f"{checkpoint.folder} holds no tensors named {' or '.join(f'{p}*' for p in _PREFIXES)}")
    return names


def _without_prefix(name: str) -> str:
    return name[name.index("visual.") + len("visual.") :]
