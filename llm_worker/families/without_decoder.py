"""Families whose vision towers the encoder serves and whose text models the worker does not have."""

from __future__ import annotations

from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError

# Qwen3.5 and Qwen4-Exp have Gated DeltaNet in three of four layers; Qwen3-Omni also takes sounds and answers in speech.
_MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen3_omni_moe")


def refuse(checkpoint: Checkpoint) -> None:
    """Refuses checkpoints of these families.

    Raises:
        CheckpointError: the checkpoint is of such a family.
    """
    config = checkpoint.config
    model_type = config["model_type"]
    if model_type not in _MODEL_TYPES:
        return
    architecture = next(iter(config.get("architectures") or ()), model_type)
    raise CheckpointError(
        f"this worker has no text model for {architecture} (model_type {model_type!r}): a Vitrine encoder serves its "
        "vision tower only; serve the text model with vLLM or SGLang, which have it"
    )
