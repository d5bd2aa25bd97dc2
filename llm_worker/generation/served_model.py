"""The loaded model as the frontends see it."""

from __future__ import annotations

from dataclasses import dataclass

from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults


@dataclass(frozen=True)
class ServedModel:
    """Exists once the model is loaded. name: as requests name it; defaults: sampling where a request sets none.

    root: the checkpoint that was loaded, as --model names it.
    """

    name: str
    generator: Generator
    defaults: SamplingDefaults
    root: str
