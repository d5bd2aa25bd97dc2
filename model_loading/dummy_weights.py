"""Random weights instead of a checkpoint's, to measure a model at its true dims without its files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError

_log = logging.getLogger(__name__)
_SEED = 0
_DEFAULT_STD = 0.02
_DEFAULT_DTYPE = "bfloat16"


def draw_dummy_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
) -> None:
    """Initializes `model`, built on the meta device, with the same random values at every start.

    Products and embeddings are normal with config.json's `initializer_range`, biases 0, norms' weights 1.

    Args:
        device, dtype: of the weights, which are drawn on the device without a copy elsewhere.
        on_progress: called with (tensors drawn, tensors in all) after each tensor.
    """
    _log.warning("LOAD FORMAT DUMMY: the weights of %s are random and its answers mean nothing", checkpoint.model)
    generator = torch.Generator(device).manual_seed(_SEED)
    std = _stated(checkpoint, "initializer_range") or _DEFAULT_STD
    undrawn = dict(model.named_parameters())  # tied parameters appear once
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in undrawn.items():
        values = torch.empty(parameter.shape, device=device, dtype=dtype)
        if name.endswith("bias"):
            values.zero_()
        elif parameter.ndim == 1:
            values.fill_(1.0)
        else:
            values.normal_(std=std, generator=generator)
        drawn[parameter] = nn.Parameter(values, requires_grad=False)
        on_progress(len(drawn), len(undrawn))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, drawn[parameter])


def configured_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype that config.json states for the weights; bfloat16 if it states none.

    Raises:
        CheckpointError: the dtype is not supported.
    """
    name = _stated(checkpoint, "dtype") or _stated(checkpoint, "torch_dtype") or _DEFAULT_DTYPE
    if name not in DTYPES:
        raise CheckpointError(
            f"config.json in {checkpoint.folder} states dtype {name!r}; supported are {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _stated(checkpoint: Checkpoint, name: str) -> Any:
    """Returns a field of config.json or of its text_config: released models have it in either place."""
    config = checkpoint.config
    return config.get(name) or (config.get("text_config") or {}).get(name)
