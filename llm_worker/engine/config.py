"""Limits of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

# "auto": keys and values have the decoder's dtype; "fp8": e4m3.
KvCacheDtype: TypeAlias = Literal["auto", "fp8"]


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine.

    max_num_batched_tokens: tokens in one step, and so the longest prefill chunk; max_num_seqs: sequences in one step.
    num_blocks blocks of block_size tokens, in kv_cache_dtype, are the KV cache; max_model_len: longest prompt plus
    answer, tokens.
    max_waiting: requests that may wait beside max_num_seqs running ones. prefix_cache: whether KV is used again.
    mixed_step_tokens: most tokens in a step that also decodes; None for max_num_batched_tokens.
    target_itl_s: goal for the time between tokens; target_ttft_s: and for a first token, from when its prompt is ready.
    """

    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64
    block_size: int = 16
    num_blocks: int = 2048
    kv_cache_dtype: KvCacheDtype = "auto"
    max_model_len: int = 32768
    max_waiting: int = 512
    prefix_cache: bool = True
    mixed_step_tokens: int | None = None
    target_itl_s: float = 0.03
    target_ttft_s: float = 0.5
