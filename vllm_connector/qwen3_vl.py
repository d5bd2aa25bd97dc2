"""vLLM's Qwen3-VL with deepstack where no tower is loaded (`--limit-mm-per-prompt '{"image": 0, "video": 0}'`).

vLLM 0.28 to 0.33 switches deepstack off there, although rows that come from elsewhere have it, and then fails on their
width. Source: vLLM 0.32, vllm/model_executor/models/qwen3_vl.py and qwen3_vl_moe.py.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe


class Qwen3VLForConditionalGeneration(qwen3_vl.Qwen3VLForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _enable_deepstack(self, vllm_config)


class Qwen3VLMoeForConditionalGeneration(qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _enable_deepstack(self, vllm_config)


def _enable_deepstack(model: Any, vllm_config: Any) -> None:
    """Gives a model that was made without its tower the deepstack buffers that it has with one."""
    config = vllm_config.model_config.hf_config
    num_levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    if model.use_deepstack or not num_levels:
        return
    model.use_deepstack = True
    model.deepstack_num_level = num_levels
    model.multiscale_dim = model.visual_dim * num_levels
    # In the dtype and on the device that are torch's defaults while vLLM makes a model.
    shape = (vllm_config.scheduler_config.max_num_batched_tokens, config.text_config.hidden_size)
    model.deepstack_input_embeds = [torch.zeros(shape) for _ in range(num_levels)]
    model.deepstack_input_embeds_num_tokens = 0
