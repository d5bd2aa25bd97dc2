"""What vLLM loads in each of its processes before a model is made: the entry point in `vllm.general_plugins`."""

from __future__ import annotations

from vllm import ModelRegistry

_PACKAGE = "vitrine_vlm.vllm_connector"
_MODELS = {
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
}


def register() -> None:
    """Registers models that take from elsewhere all that they would have from their own tower and processor."""
    for name, module in _MODELS.items():
        ModelRegistry.register_model(name, f"{_PACKAGE}.{module}:{name}")
