"""The ranges of sampling parameters, the same for every frontend."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.request import SamplingParams

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
# Each sequence is compared with the end of the answer in every step, on the engine's thread.
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 128
# Excluded one by one in every step of an answer's first min_tokens.
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS_TOKENS = 16 * 1024
# Beyond these a logit divided by the smallest temperature overflows.
_REPETITION_PENALTIES = (0.01, 100.0)


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """
    Raises:
        BadRequest: a parameter is out of range, names a token that the vocabulary lacks, or leaves no token to choose.
    """
    _check_range("temperature", params.temperature, 0.0, math.inf)
    if not 0 < params.top_p <= 1:  # false for NaN
        raise BadRequest(f"top_p is {params.top_p}: it must be in (0, 1]", "top_p")
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", params.repetition_penalty, *_REPETITION_PENALTIES)
    if params.logprobs is not None:
        _check_range("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    if params.prompt_logprobs is not None:
        _check_range("prompt_logprobs", params.prompt_logprobs, 0, MAX_LOGPROBS)
    _check_min_tokens(params)
    check_number("stop_token_ids", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_number("logit_bias", len(params.logit_bias), MAX_LOGIT_BIAS_TOKENS)
    for bias in params.logit_bias.values():
        _check_range("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    _check_token_ids("logit_bias", params.logit_bias, vocab_size)
    _check_bad_words(params.bad_words, vocab_size)
    if params.allowed_token_ids is not None:
        _check_token_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
    _check_that_tokens_are_left(params, vocab_size)


def check_number(name: str, num: int, most: int) -> None:
    """
    Raises:
        BadRequest: a field has more entries than it may have.
    """
    if num > most:
        raise BadRequest(f"{name} has {num} entries: at most {most} are accepted: send fewer", name)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not (least <= value <= most and math.isfinite(value)):
        limits = f"at least {least:g} and finite" if most == math.inf else f"between {least:g} and {most:g}"
        raise BadRequest(f"{name} is {value}: it must be {limits}", name)


def _check_min_tokens(params: SamplingParams) -> None:
    if params.min_tokens < 0:
        raise BadRequest(f"min_tokens is {params.min_tokens}: it must be at least 0", "min_tokens")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise BadRequest(
            f"min_tokens is {params.min_tokens}: it must be at most max_tokens, {params.max_tokens}", "min_tokens"
        )


def _check_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise BadRequest(
            f"{name} has token ids {min(token_ids)}..{max(token_ids)}: they must be in 0..{vocab_size - 1}", name
        )


def _check_bad_words(bad_words: Collection[tuple[int, ...]], vocab_size: int) -> None:
    if len(bad_words) > MAX_BAD_WORDS:
        raise BadRequest(f"bad_words has {len(bad_words)} sequences: at most {MAX_BAD_WORDS} are accepted", "bad_words")
    for word in bad_words:
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise BadRequest(
                f"bad_words has a sequence of {len(word)} tokens: each must have 1 to {MAX_BAD_WORD_TOKENS}",
                "bad_words",
            )
        _check_token_ids("bad_words", word, vocab_size)


def _check_that_tokens_are_left(params: SamplingParams, vocab_size: int) -> None:
    """Refuses parameters that may exclude every token at some place of the answer."""
    excluded = {word[-1] for word in params.bad_words}
    if params.min_tokens:
        excluded |= params.stop_token_ids
    allowed: Iterable[int] = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if all(token_id in excluded for token_id in allowed):
        name = "bad_words" if params.allowed_token_ids is None else "allowed_token_ids"
        raise BadRequest(
            f"{name} leaves no token to choose: allow one that ends no bad word and, with min_tokens, is no stop token",
            name,
        )
