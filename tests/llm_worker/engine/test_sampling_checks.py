"""Sampling parameters out of range are refused by name; all others are accepted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.sampling_checks import check_sampling

VOCAB_SIZE = 100


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0, "top_p": 1e-46, "min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 0.5},
        {"logprobs": 20, "min_tokens": 3, "max_tokens": 3},
        {"logit_bias": {0: -100.0, 99: 100}, "bad_words": ((0,), (1, 2)), "allowed_token_ids": frozenset([2, 3])},
        {"allowed_token_ids": frozenset([7]), "stop_token_ids": frozenset([7])},
    ],
)
def test_values_in_range_are_accepted(fields: dict[str, Any]) -> None:
    check_sampling(SamplingParams(**fields), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e30),
        ("repetition_penalty", math.nan),
        ("logprobs", 21),
        ("logprobs", -1),
        ("min_tokens", -1),
        ("min_tokens", 9),
        ("logit_bias", {1: 100.1}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {VOCAB_SIZE: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("bad_words", ((),)),
        ("bad_words", ((1,) * 129,)),
        ("bad_words", ((1,),) * 129),
        ("bad_words", ((1, VOCAB_SIZE),)),
        ("bad_words", tuple((token_id,) for token_id in range(VOCAB_SIZE))),
        ("allowed_token_ids", frozenset()),
        ("allowed_token_ids", frozenset([-1])),
        ("allowed_token_ids", frozenset([10**30])),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadRequest, match=name) as refused:
        check_sampling(replace(SamplingParams(max_tokens=8), **{name: value}), VOCAB_SIZE)  # type: ignore[arg-type]
    assert refused.value.param == name


@pytest.mark.parametrize("other", [{"bad_words": ((5, 7),)}, {"min_tokens": 1, "stop_token_ids": frozenset([7])}])
def test_some_token_is_always_left(other: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="no token to choose") as refused:
        check_sampling(SamplingParams(allowed_token_ids=frozenset([7]), **other), VOCAB_SIZE)
    assert refused.value.param == "allowed_token_ids"
    check_sampling(SamplingParams(allowed_token_ids=frozenset([7, 8]), **other), VOCAB_SIZE)
