"""The families of checkpoints that the worker serves: one file each, with all that is particular to the family.

docs/add_a_model_family.md says how one is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from vitrine_vlm.llm_worker.families import qwen2_5_vl, qwen3_vl, without_decoder
from vitrine_vlm.llm_worker.families.family import Family
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.quantization import has_fp8_products, quantize
from vitrine_vlm.llm_worker.models.rank_group import RankGroup
from vitrine_vlm.llm_worker.models.sharding import config_of_rank
from vitrine_vlm.llm_worker.models.weights import load_language_weights
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError
from vitrine_vlm.model_loading.dummy_weights import draw_dummy_weights
from vitrine_vlm.model_loading.fp8_weights import fp8_format

__all__ = ["FAMILIES", "Family", "build_decoder", "family_of", "prompt_config", "text_config"]

FAMILIES = (qwen3_vl.FAMILY, qwen2_5_vl.FAMILY)


def family_of(checkpoint: Checkpoint) -> Family:
    """Returns the family that the checkpoint belongs to.

    Raises:
        CheckpointError: no family has this model type; the message says what to do.
    """
    model_type = checkpoint.config["model_type"]
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    without_decoder.refuse(checkpoint)
    served = ", ".join(each for family in FAMILIES for each in family.model_types)
    raise CheckpointError(f"model_type {model_type!r} has no decoder here; supported are {served}")


def text_config(checkpoint: Checkpoint) -> TextConfig:
    """The dims and features of the checkpoint's decoder.

    Raises:
        CheckpointError: see `family_of` and `Family`.
    """
    return family_of(checkpoint).text_config(checkpoint)


def prompt_config(checkpoint: Checkpoint) -> PromptConfig:
    """The checkpoint's special tokens, and the rules by which its media tokens are placed.

    Raises:
        CheckpointError: see `family_of` and `Family`.
    """
    return family_of(checkpoint).prompt_config(checkpoint)


def build_decoder(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
    group: RankGroup | None = None,
    quantization: Literal["fp8"] | None = None,
    keep_fp8: bool | None = None,
) -> TextDecoder:
    """The checkpoint's text decoder with its weights (or dummies); the vision tower's tensors are not read.

    Args:
        group: the ranks that share the decoder, each of which reads only its part; None for one rank with all of it.
        quantization: "fp8" quantizes a checkpoint that is not in FP8.
        keep_fp8: whether linear layers in FP8 become `Fp8Linear`; None where the device multiplies them as they are.

    Raises:
        CheckpointError: a model type without a decoder here, weights that do not match config.json, or a model that
            cannot be cut into so many parts.
    """
    config = text_config(checkpoint)
    with torch.device("meta"):
        decoder = TextDecoder(config_of_rank(config, group.size) if group is not None else config, group)
    keep_fp8 = has_fp8_products(device, dtype) if keep_fp8 is None else keep_fp8
    in_fp8 = False
    if checkpoint.load_format == "dummy":
        draw_dummy_weights(decoder, checkpoint, device, dtype, on_progress)
    else:
        load_language_weights(decoder, checkpoint, device, dtype, on_progress, keep_fp8=keep_fp8)
        in_fp8 = fp8_format(checkpoint) is not None
    if quantization == "fp8" and not in_fp8:
        quantize(decoder, keep=keep_fp8)
    return decoder.eval().requires_grad_(False)
