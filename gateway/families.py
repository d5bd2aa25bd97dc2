"""What vLLM takes of a video with embeddings, by the family of its model."""

from __future__ import annotations

# vLLM 0.32 takes the times of a video's frames with embeddings of all families but this one. It then takes one second
# between temporal patches, of which each second is `POSITIONS_PER_S` positions.
# Source: vLLM 0.32, `iter_mm_grid_thw` and `get_mrope_input_positions` of vllm/model_executor/models/qwen2_5_vl.py.
_WITHOUT_TIMES = frozenset({"qwen2_5_vl"})
POSITIONS_PER_S = 2  # `tokens_per_second` of all its checkpoints


def takes_times(model_type: str) -> bool:
    """Whether vLLM takes the times of a video's frames with embeddings of such a model."""
    return model_type not in _WITHOUT_TIMES
