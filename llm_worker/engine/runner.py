"""Runs the decoder over what the input buffers hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from llm_worker.engine.kv_cache import KvCache
from llm_worker.models.decoder import StepInputs, TextDecoder

# A step's inputs to hidden states after the last norm, [T, C], which are valid until the next step.
Runner: TypeAlias = Callable[[StepInputs], torch.Tensor]
MakeRunner: TypeAlias = Callable[[TextDecoder, KvCache, InputEmbedBuffer], Runner]


def plain_runner(decoder: TextDecoder, kv_cache: KvCache, buffer: InputEmbedBuffer) -> Runner:
    """The decoder as it is."""
    return lambda inputs: decoder(inputs, kv_cache.layers)
