"""Text decoders of our own: input buffers in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from embedding_transport.checkpoint import Checkpoint
from embedding_transport.dummy_weights import draw_dummy_weights
from llm_worker.models.config import text_config
from llm_worker.models.decoder import TextDecoder
from llm_worker.models.rank_group import RankGroup
from llm_worker.models.sharding import config_of_rank
from llm_worker.models.weights import load_language_weights


def build_decoder(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda num_loaded, num_tensors: None,
    group: RankGroup | None = None,
) -> TextDecoder:
    """The checkpoint's text decoder with its weights (or dummies); the vision tower's tensors are not read.

    Args:
        group: the ranks that share it, of which ours reads its part alone; None for all of it.

    Raises:
        CheckpointError: a model type we have no decoder for, weights that do not match config.json, or a model that
            cannot be cut into so many parts.
    """
    config = text_config(checkpoint)
    with torch.device("meta"):
        decoder = TextDecoder(config_of_rank(config, group.size) if group is not None else config, group)
    if checkpoint.load_format == "dummy":
        draw_dummy_weights(decoder, checkpoint, device, dtype, on_progress)
    else:
        load_language_weights(decoder, checkpoint, device, dtype, on_progress)
    return decoder.eval().requires_grad_(False)
