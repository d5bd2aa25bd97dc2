"""Runners: they run the decoder over the input buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder


class Runner(Protocol):
    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states after the last norm, [T, C]; valid until the next step."""
        ...

    def wait_until_nearly_done(self) -> bool:
        """Waits until the last step is about to end, to launch the next; returns False where that is unknown."""
        ...


MakeRunner: TypeAlias = Callable[[TextDecoder, KvCache, InputEmbedBuffer], Runner]


class PlainRunner:
    """Runs the decoder as plain torch code."""

    def __init__(self, decoder: TextDecoder, kv_cache: KvCache, buffer: InputEmbedBuffer) -> None:
        self._decoder, self._layers = decoder, kv_cache.layers

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        hidden_TC: torch.Tensor = self._decoder(inputs, self._layers)
        return hidden_TC

    def wait_until_nearly_done(self) -> bool:
        return False
