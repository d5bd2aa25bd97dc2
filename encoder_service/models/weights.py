"""Loads a tower's weights from a checkpoint: the visual tensors, all of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError
from vitrine_vlm.model_loading.dummy_weights import configured_dtype


@dataclass(frozen=True)
class VisualWeights:
    """Where a checkpoint has the tensors of its vision tower, and what they are called there.

    prefixes: of their names, one a layout in use.
    renamed: parts of the names behind the prefix, and what the tower calls them; replaced in this order.
    """

    prefixes: tuple[str, ...] = ("visual.", "model.visual.")
    renamed: tuple[tuple[str, str], ...] = ()

    def names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The tower's names of all visual tensors of the checkpoint, and the checkpoint's names.

        Raises:
            CheckpointError: it holds none, or two for the same place.
        """
        names: dict[str, str] = {}
        for stored in checkpoint.tensor_names():
            if not stored.startswith(self.prefixes):
                continue
            name = self._own_name(stored)
            if name in names:
                raise CheckpointError(
                    f"{names[name]} and {stored} in {checkpoint.folder} are one tensor of the tower: remove one of them"
                )
            names[name] = stored
        if not names:
            raise CheckpointError(
                f"{checkpoint.folder} holds no tensors named {' or '.join(f'{each}*' for each in self.prefixes)}"
            )
        return names

    def _own_name(self, stored: str) -> str:
        name = next(stored.removeprefix(each) for each in self.prefixes if stored.startswith(each))
        for theirs, ours in self.renamed:
            name = name.replace(theirs, ours)
        return name


def load_visual_weights(
    tower: nn.Module,
    checkpoint: Checkpoint,
    weights: VisualWeights,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
) -> None:
    """Fills `tower`, built on the meta device, with the checkpoint's visual tensors.

    Args:
        weights: how the tower's parameter names follow from the checkpoint's.
        device, dtype: where the weights go and what they become.
        on_progress: called with (tensors loaded, tensors in all) after each.

    Raises:
        CheckpointError: a tensor is missing, is left over, or has another shape.
    """
    expected = tower.state_dict()
    names = weights.names(checkpoint)
    missing, unexpected = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"visual tensors of {checkpoint.folder} do not match its config.json: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    own_names = {stored: name for name, stored in names.items()}
    loaded: dict[str, torch.Tensor] = {}
    for stored, tensor in checkpoint.read_tensors(list(own_names)):
        name = own_names[stored]
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{stored} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
            )
        loaded[name] = tensor.to(device, dtype)
        on_progress(len(loaded), len(expected))
    tower.load_state_dict(loaded, strict=True, assign=True)


def stored_dtype(checkpoint: Checkpoint, weights: VisualWeights) -> torch.dtype:
    """Element type of the visual weights on disk, read from one tensor; of dummies what config.json says.

    Raises:
        CheckpointError: no visual tensors.
    """
    if checkpoint.load_format == "dummy":
        return configured_dtype(checkpoint)
    name = next(iter(weights.names(checkpoint).values()))
    return next(checkpoint.read_tensors([name]))[1].dtype
