"""Qwen2.5-VL: biases in the projections, M-RoPE in blocks; a video's time is in the positions of its tokens.

Source: transformers 5.23 `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (Qwen2_5_VLTextModel, `get_rope_index`,
`get_vision_position_ids`) and `processing_qwen2_5_vl.py` (`replace_video_token`).
"""

from __future__ import annotations

from vitrine_vlm.llm_worker.families.family import Family
from vitrine_vlm.llm_worker.models.config import TextConfig, read_text_config
from vitrine_vlm.llm_worker.prompt.config import PromptConfig, read_prompt_config
from vitrine_vlm.model_loading.checkpoint import Checkpoint


def _text_config(checkpoint: Checkpoint) -> TextConfig:
    return read_text_config(checkpoint, mrope_interleaved=False, qk_norm=False, qkv_bias=True, moe=False)


def _prompt_config(checkpoint: Checkpoint) -> PromptConfig:
    return read_prompt_config(checkpoint, timestamped_videos=False)


FAMILY = Family(model_types=("qwen2_5_vl",), text_config=_text_config, prompt_config=_prompt_config)
