"""Reads the scales of keys and values from checkpoints that were calibrated for a KV cache in FP8.

Source: compressed-tensors' `KVCacheScaleType` (`self_attn.k_scale`); vLLM's `maybe_remap_kv_scale_name` for the names
that ModelOpt writes (`self_attn.k_proj.k_scale`).
"""

from __future__ import annotations

import math
from collections.abc import Collection

from vitrine_vlm.llm_worker.models.decoder import DecoderLayer, TextDecoder
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError


def kv_scale_names(prefix: str, num_layers: int, stored_names: Collection[str]) -> dict[str, tuple[int, str]]:
    """The names of such scales among a checkpoint's tensors, each with its layer and the field of `KvScales`.

    Args:
        prefix: of the decoder's tensors.
    """
    named = {
        f"{prefix}layers.{layer}.self_attn.{module}{kind}_scale": (layer, kind)
        for layer in range(num_layers)
        for kind in ("k", "v")
        for module in ("", f"{kind}_proj.")
    }
    return {name: place for name, place in named.items() if name in stored_names}


def set_kv_scales(decoder: TextDecoder, checkpoint: Checkpoint, names: dict[str, tuple[int, str]]) -> None:
    """Sets the scales of the decoder's layers; those that the checkpoint does not have stay 1.

    Args:
        names: of `kv_scale_names`.

    Raises:
        CheckpointError: a scale is not one positive number.
    """
    for name, scale in checkpoint.read_tensors(list(names)) if names else ():
        if scale.numel() != 1:
            raise CheckpointError(
                f"{name} has shape {tuple(scale.shape)}: of scales of keys and values, one a layer is supported"
            )
        value = float(scale.float().item())
        if not (value > 0 and math.isfinite(value)):
            raise CheckpointError(f"{name} is {value}, and a scale of keys and values must be positive")
        index, kind = names[name]
        layer = decoder.layers[index]
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.kv_scales = layer.self_attn.kv_scales._replace(**{kind: value})
