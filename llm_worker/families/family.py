"""The worker's description of a family of vision-language checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.model_loading.checkpoint import Checkpoint


@dataclass(frozen=True)
class Family:
    """Checkpoints whose text decoders and prompts follow the same rules.

    model_types: values of config.json's `model_type`.
    text_config: the decoder's dims and features.
    prompt_config: special tokens, and how media tokens are placed.

    Both readers raise CheckpointError where config.json lacks a field or asks for something that is not supported.
    """

    model_types: tuple[str, ...]
    text_config: Callable[[Checkpoint], TextConfig]
    prompt_config: Callable[[Checkpoint], PromptConfig]
