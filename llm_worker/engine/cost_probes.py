"""Measures at start how long steps take, by size and by context."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch

from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, SamplingParams
from vitrine_vlm.llm_worker.engine.request_parts import SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts, causal_pairs

_log = logging.getLogger(__name__)

_DECODE_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_PROMPT_SIZES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Steps that decode are not meant to be longer.
_LONGEST_PROBE_S = 0.05
# Long contexts: of several sequences that decode, together, and of a chunk of a prompt.
_LONG_CONTEXT, _NUM_LONG_DECODES, _LONG_CHUNK = 4096, 8, 256

# Tokens [start, stop) of each sequence of a step.
_Spans: TypeAlias = Sequence[tuple[int, int]]


def measure_step_costs(forward_pass: ForwardPass, config: EngineConfig) -> StepCosts:
    """Runs steps of growing size, which takes about a second. Leaves no block of the KV cache allocated."""
    context = min(_LONG_CONTEXT, config.max_model_len, config.num_blocks * config.block_size)
    chunk = min(_LONG_CHUNK, config.max_num_batched_tokens, context)
    batch = min(config.max_num_seqs, config.max_num_batched_tokens, config.num_blocks)
    num_decodes = min(_NUM_LONG_DECODES, batch)
    keys = max(1, context // config.block_size // num_decodes * config.block_size)
    with torch.inference_mode():
        short_s, long_s = (_measure(forward_pass, [(stop - 1, stop)] * num_decodes) for stop in (1, keys))
        per_key_s = max(0.0, long_s - short_s) / max(1, num_decodes * (keys - 1))
        short_s, long_s = (_measure(forward_pass, [(stop - chunk, stop)]) for stop in (chunk, context))
        per_pair_s = max(0.0, long_s - short_s) / max(1, chunk * (context - chunk))
        decode_s = _measure_growing(forward_pass, ((size, [(0, 1)] * size) for size in _up_to(batch, _DECODE_SIZES)))
        longest = min(config.max_num_batched_tokens, context)
        mixed_s = _measure_growing(forward_pass, ((size, [(0, size)]) for size in _up_to(longest, _PROMPT_SIZES)))
    # Without what the tokens of one prompt attend to among themselves, which is counted in pairs.
    mixed_s = {size: max(0.0, seconds - per_pair_s * causal_pairs(0, size)) for size, seconds in mixed_s.items()}
    most = max(mixed_s)
    _log.info(
        "cost of a step: %.3g ms with 1 token, %.3g ms with %d; %.3g ns a key, %.3g ns a pair",
        *(1e3 * decode_s[1], 1e3 * mixed_s[most], most, 1e9 * per_key_s, 1e9 * per_pair_s),
    )
    return StepCosts(decode_s, mixed_s, per_key_s, per_pair_s)


def _up_to(limit: int, sizes: Iterable[int]) -> list[int]:
    return [*(size for size in sizes if size < limit), limit] if limit < max(sizes) else list(sizes)


def _measure_growing(forward_pass: ForwardPass, steps: Iterable[tuple[int, _Spans]]) -> dict[int, float]:
    """Seconds by size, up to the first that takes longer than is of interest."""
    found: dict[int, float] = {}
    for size, spans in steps:
        found[size] = _measure(forward_pass, spans)
        if found[size] > _LONGEST_PROBE_S:
            break
    return found


def _measure(forward_pass: ForwardPass, spans: _Spans) -> float:
    """Seconds of a step: the shorter of two, as the first prepares what later ones use."""
    cache, device = forward_pass.kv_cache, forward_pass.decoder.device
    chunks = [_chunk(index, *span) for index, span in enumerate(spans)]
    try:
        for chunk in chunks:
            cache.append_slots(chunk.request.table, chunk.stop)
        return min(_time(forward_pass, chunks, device) for _ in range(2))
    finally:
        for chunk in chunks:
            cache.release(chunk.request.table)


def _chunk(key: int, start: int, stop: int) -> Chunk:
    request = RequestState(key, "", [], SampledTokens(SamplingParams()))
    request.set_prompt(ExpandedPrompt([0] * stop, torch.arange(stop).expand(3, -1), stop))
    return Chunk(request, start, stop, samples=True)


def _time(forward_pass: ForwardPass, chunks: list[Chunk], device: torch.device) -> float:
    begin = time.perf_counter()
    forward_pass(chunks)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
