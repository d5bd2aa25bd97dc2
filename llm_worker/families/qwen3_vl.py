"""Qwen3-VL, dense and MoE: query and key norms, interleaved M-RoPE, deepstack; a video's timestamps are text.

Source: transformers 5.23 `models/qwen3_vl/modeling_qwen3_vl.py` (Qwen3VLTextModel, Qwen3VLTextRotaryEmbedding,
`get_rope_index`) and `processing_qwen3_vl.py` (`replace_video_token`); experts: `models/qwen3_vl_moe`
(Qwen3VLMoeTextSparseMoeBlock).
"""

from __future__ import annotations

from vitrine_vlm.llm_worker.families.family import Family
from vitrine_vlm.llm_worker.models.config import TextConfig, read_text_config
from vitrine_vlm.llm_worker.prompt.config import PromptConfig, read_prompt_config
from vitrine_vlm.model_loading.checkpoint import Checkpoint

_MOE = "qwen3_vl_moe"


def _text_config(checkpoint: Checkpoint) -> TextConfig:
    moe = checkpoint.config["model_type"] == _MOE
    return read_text_config(checkpoint, mrope_interleaved=True, qk_norm=True, qkv_bias=False, moe=moe)


def _prompt_config(checkpoint: Checkpoint) -> PromptConfig:
    return read_prompt_config(checkpoint, timestamped_videos=True)


FAMILY = Family(model_types=("qwen3_vl", _MOE), text_config=_text_config, prompt_config=_prompt_config)
