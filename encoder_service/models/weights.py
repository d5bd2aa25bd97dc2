"""Loads a tower's weights from a checkpoint: the visual tensors, all of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError
from vitrine_vlm.model_loading.dummy_weights import configured_dtype
from vitrine_vlm.model_loading.fp8_weights import read_weights, scale_names


@dataclass(frozen=True)
class VisualWeights:
    """The names of a vision tower's tensors in a checkpoint.

    prefixes: prefixes of their names, one for each layout in use.
    renamed: parts of the names behind the prefix, and the tower's names for them; replaced in this order.
    """

    prefixes: tuple[str, ...] = ("visual.", "model.visual.")
    renamed: tuple[tuple[str, str], ...] = ()

    def names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The checkpoint's names of all its visual tensors, by the tower's names, without the scales of FP8 weights.

        Raises:
            CheckpointError: there are none, or two for one tensor of the tower.
        """
        names: dict[str, str] = {}
        visual = [name for name in checkpoint.tensor_names() if name.startswith(self.prefixes)]
        scales = set(scale_names(visual).values())
        for stored in visual:
            if stored in scales:
                continue
            name = self._tower_name(stored)
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

    def _tower_name(self, stored: str) -> str:
        name = next(stored.removeprefix(each) for each in self.prefixes if stored.startswith(each))
        for checkpoint_part, tower_part in self.renamed:
            name = name.replace(checkpoint_part, tower_part)
        return name


def load_visual_weights(
    tower: nn.Module,
    checkpoint: Checkpoint,
    weights: VisualWeights,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
) -> None:
    """Fills `tower`, built on the meta device, with the checkpoint's visual tensors, dequantized where in FP8.

    Args:
        weights: the names of the tensors in the checkpoint.
        device, dtype: of the tower's weights.
        on_progress: called with (tensors loaded, tensors in all) after each.

    Raises:
        CheckpointError: a tensor is missing or unexpected, has another shape, or a scale that config.json contradicts.
    """
    expected = tower.state_dict()
    names = weights.names(checkpoint)
    missing, unexpected = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"visual tensors of {checkpoint.folder} do not match its config.json: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    tower_names = {stored: name for name, stored in names.items()}
    loaded: dict[str, torch.Tensor] = {}
    for stored, weight in read_weights(checkpoint, list(tower_names)):
        name = tower_names[stored]
        tensor = weight.dequantized(dtype) if isinstance(weight, Fp8Weight) else weight
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{stored} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
            )
        loaded[name] = tensor.to(device, dtype)
        on_progress(len(loaded), len(expected))
    tower.load_state_dict(loaded, strict=True, assign=True)


def stored_dtype(checkpoint: Checkpoint, weights: VisualWeights) -> torch.dtype:
    """The dtype of the visual weights on disk, of one that is not in FP8; for dummy weights, that of config.json.

    Raises:
        CheckpointError: the checkpoint has no visual tensors.
    """
    if checkpoint.load_format == "dummy":
        return configured_dtype(checkpoint)
    scaled = scale_names(checkpoint.tensor_names())
    names = [name for name in weights.names(checkpoint).values() if name not in scaled]
    return next(checkpoint.read_tensors(names[:1]))[1].dtype
