"""Text decoders of our own: input buffers in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embedding_transport.checkpoint import Checkpoint
from embedding_transport.dummy_weights import draw_dummy_weights
from llm_worker.models.config import text_config
from llm_worker.models.decoder import TextDecoder
from llm_worker.models.weights import load_language_weights


def build_decoder(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
) -> TextDecoder:
    """The checkpoint's text decoder with its weights (or dummies); the vision tower's tensors are not read.

    Raises:
        CheckpointError: a model type we have no decoder for, or weights that do not match config.json.
    """
    with torch.device("meta"):
        decoder = TextDecoder(text_config(checkpoint))
    if checkpoint.load_format == "dummy":
        draw_dummy_weights(decoder, checkpoint, device, dtype, on_progress)
    else:
        load_language_weights(decoder, checkpoint, device, dtype, on_progress)
    return decoder.eval().requires_grad_(False)
