"""What vLLM takes of a video with embeddings, by the family of its model."""

from __future__ import annotations

# These take the interval between temporal patches; all others take the time of each.
_WITH_INTERVAL = frozenset({"qwen2_5_vl"})


def takes_interval(model_type: str) -> bool:
    """Whether vLLM takes the seconds between the temporal patches of a video instead of the time of each."""
    return model_type in _WITH_INTERVAL
