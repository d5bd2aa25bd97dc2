"""Measures at start how long steps take, by size and by context."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
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

# Each round measures every step once, and a step costs the least of all rounds. The last round is quiet: most of its
# steps are as long as the least so far. A start beside an encoder's on the same GPU is disturbed for seconds.
_NEAR, _MOST = 1.1, 0.75

# Tokens [start, stop) of each sequence of a step.
_Spans: TypeAlias = tuple[tuple[int, int], ...]


def measure_step_costs(forward_pass: ForwardPass, config: EngineConfig, patience_s: float = 0.0) -> StepCosts:
    """Runs steps of growing size, which takes about a second. Leaves no block of the KV cache allocated.

    Args:
        patience_s: how long rounds may go on until one is quiet; there are two at least.
    """
    context = min(_LONG_CONTEXT, config.max_model_len, config.num_blocks * config.block_size)
    chunk = min(_LONG_CHUNK, config.max_num_batched_tokens, context)
    batch = min(config.max_num_seqs, config.max_num_batched_tokens, config.num_blocks)
    num_decodes = min(_NUM_LONG_DECODES, batch)
    keys = max(1, context // config.block_size // num_decodes * config.block_size)
    few_keys: _Spans = ((0, 1),) * num_decodes
    many_keys: _Spans = ((keys - 1, keys),) * num_decodes
    few_pairs: _Spans = ((0, chunk),)
    many_pairs: _Spans = ((context - chunk, context),)
    decodes: dict[int, _Spans] = {size: ((0, 1),) * size for size in _up_to(batch, _DECODE_SIZES)}
    longest = min(config.max_num_batched_tokens, context)
    prompts: dict[int, _Spans] = {size: ((0, size),) for size in _up_to(longest, _PROMPT_SIZES)}
    contexts = [[few_keys], [many_keys], [few_pairs], [many_pairs]]
    with torch.inference_mode():
        least_s = _least_seconds(forward_pass, [*contexts, [*decodes.values()], [*prompts.values()]], patience_s)
    per_key_s = max(0.0, least_s[many_keys] - least_s[few_keys]) / max(1, num_decodes * (keys - 1))
    per_pair_s = max(0.0, least_s[many_pairs] - least_s[few_pairs]) / max(1, chunk * (context - chunk))
    decode_s = _ascending({size: least_s[spans] for size, spans in decodes.items() if spans in least_s})
    mixed_s = _ascending({size: least_s[spans] for size, spans in prompts.items() if spans in least_s})
    # Without what the tokens of one prompt attend to among themselves, which is counted in pairs.
    alone_s = (max(0.0, seconds - per_pair_s * causal_pairs(0, size)) for size, seconds in mixed_s.items())
    # More tokens cost no less, which a `per_pair_s` that was measured too high would say.
    mixed_s = dict(zip(mixed_s, accumulate(alone_s, max), strict=True))
    most = max(mixed_s)
    _log.info(
        "cost of a step: %.3g ms with 1 token, %.3g ms with %d; %.3g ns a key, %.3g ns a pair",
        *(1e3 * decode_s[1], 1e3 * mixed_s[most], most, 1e9 * per_key_s, 1e9 * per_pair_s),
    )
    return StepCosts(decode_s, mixed_s, per_key_s, per_pair_s)


def _up_to(limit: int, sizes: Iterable[int]) -> list[int]:
    return [*(size for size in sizes if size < limit), limit] if limit < max(sizes) else list(sizes)


def _least_seconds(
    forward_pass: ForwardPass, growing: Sequence[Sequence[_Spans]], patience_s: float
) -> dict[_Spans, float]:
    """
    Args:
        growing: lists of steps, each longer than the one in front; of each, those behind the first that takes longer
            than is of interest are left out.
    """
    begin = time.monotonic()
    least_s = _measure_round(forward_pass, growing, {})  # prepares what later rounds use
    while True:
        found_s = _measure_round(forward_pass, growing, least_s)
        ratios = (seconds / least_s.get(spans, math.inf) for spans, seconds in found_s.items())
        num_near = sum(1 / _NEAR <= ratio <= _NEAR for ratio in ratios)
        least_s |= {spans: min(seconds, least_s.get(spans, math.inf)) for spans, seconds in found_s.items()}
        if num_near >= _MOST * len(found_s) or time.monotonic() - begin >= patience_s:
            return least_s


def _measure_round(
    forward_pass: ForwardPass, growing: Sequence[Sequence[_Spans]], least_s: Mapping[_Spans, float]
) -> dict[_Spans, float]:
    """Measures each step once. least_s: seconds of earlier rounds."""
    found_s: dict[_Spans, float] = {}
    for steps in growing:
        for spans in steps:
            found_s[spans] = _measure(forward_pass, spans)
            if min(found_s[spans], least_s.get(spans, math.inf)) > _LONGEST_PROBE_S:
                break
    return found_s


def _ascending(seconds: Mapping[int, float]) -> dict[int, float]:
    """The seconds by size, where a size costs at most what the next larger one costs: it was disturbed otherwise."""
    sizes = sorted(seconds)
    least = list(accumulate((seconds[size] for size in reversed(sizes)), min))
    return dict(zip(sizes, reversed(least), strict=True))


def _measure(forward_pass: ForwardPass, spans: _Spans) -> float:
    """Seconds of a step."""
    cache, device = forward_pass.kv_cache, forward_pass.decoder.device
    chunks = [_chunk(index, *span) for index, span in enumerate(spans)]
    try:
        for chunk in chunks:
            cache.append_slots(chunk.request.table, chunk.stop)
        begin = time.perf_counter()
        forward_pass(chunks)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin
    finally:
        for chunk in chunks:
            cache.release(chunk.request.table)


def _chunk(key: int, start: int, stop: int) -> Chunk:
    request = RequestState(key, "", [], SampledTokens(SamplingParams()))
    request.set_prompt(ExpandedPrompt([0] * stop, torch.arange(stop).expand(3, -1), stop))
    return Chunk(request, start, stop, samples=True)
