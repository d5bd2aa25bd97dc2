"""What vLLM loads in each of its processes before a model is made: the entry point in `vllm.general_plugins`."""

from __future__ import annotations

from vllm import ModelRegistry

_MODULE = "vitrine_vlm.vllm_connector.qwen3_vl"


def register() -> None:
    """Registers the models that keep deepstack where their tower is not loaded; with a tower they are vLLM's own."""
    for name in ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"):
        ModelRegistry.register_model(name, f"{_MODULE}:{name}")
