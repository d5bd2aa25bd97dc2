"""Answers under sampling parameters that change logits equal transformers', on a random checkpoint: also where steps
overlap, requests are preempted, prompts are cut into chunks, cached or computed elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.integration.test_parity import CASES
from tests.llm_worker.engine.harness import (
    Request,
    collect,
    is_idle,
    request_for,
    running_engine,
    submit,
    tokens,
    until,
)
from tests.llm_worker.engine.reference_processors import processors
from tests.llm_worker.engine.test_following_steps import Followed
from tests.llm_worker.engine.test_prefilled_elsewhere import Continued, prefilled
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.sample_models.reference import Reference

NUM_TOKENS = 32


@pytest.fixture(scope="module")
def question(reference: Reference) -> Request:
    return request_for(reference, CASES["text_only"].text, [])


@pytest.fixture(scope="module")
def plain_answer(reference: Reference, question: Request) -> list[int]:
    return reference.greedy(question.inputs, NUM_TOKENS)[0]


@pytest.fixture(scope="module")
def every_params(plain_answer: list[int]) -> dict[str, SamplingParams]:
    """Parameters that change this answer."""
    first, second, third, *rest = plain_answer
    phrase = (rest[0], rest[1])
    base = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    return {
        "presence": replace(base, presence_penalty=2.0),
        "frequency": replace(base, frequency_penalty=2.0),
        "repetition": replace(base, repetition_penalty=1.4),
        "bias": replace(base, logit_bias={first: -100.0, second: 1.0}),
        "bad words": replace(base, bad_words=(phrase, (second,), (first, third))),
        "min_tokens": replace(base, min_tokens=NUM_TOKENS, stop_token_ids=frozenset([third])),
        "allowed": replace(base, allowed_token_ids=frozenset(range(40, 90))),
        "all": replace(
            base,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
            logit_bias={rest[3]: 0.5},
            bad_words=(phrase,),
            min_tokens=NUM_TOKENS - 2,
            stop_token_ids=frozenset([third]),
            allowed_token_ids=frozenset(range(200)),
        ),
    }


@pytest.fixture(scope="module")
def expected(
    reference: Reference, question: Request, plain_answer: list[int], every_params: dict[str, SamplingParams]
) -> dict[str, list[int]]:
    answers = {name: _by_transformers(reference, question, params) for name, params in every_params.items()}
    assert all(answer != plain_answer for answer in answers.values())
    return answers


def _by_transformers(reference: Reference, request: Request, params: SamplingParams) -> list[int]:
    num_prompt = request.inputs["input_ids"].shape[1]
    with torch.inference_mode():
        ids: torch.Tensor = reference.model.generate(
            **request.inputs,
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=sorted(params.stop_token_ids) or None,
            pad_token_id=0,
            logits_processor=processors(params, num_prompt),
        )
    answer: list[int] = ids[0, num_prompt:].tolist()
    return answer


@pytest.mark.parametrize("make_runner", [PlainRunner, Followed])
@pytest.mark.parametrize("chunk_size", [16, 2048])
async def test_answers_equal_transformers(
    qwen3_vl_folder: Path,
    question: Request,
    every_params: dict[str, SamplingParams],
    expected: dict[str, list[int]],
    plain_answer: list[int],
    make_runner: MakeRunner,
    chunk_size: int,
) -> None:
    """In one batch, beside a request without any; twice, the second time with a cached prompt."""
    plain = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    with running_engine(qwen3_vl_folder, make_runner, max_num_batched_tokens=chunk_size, num_blocks=256) as engine:
        for _ in range(2):
            handles = [submit(engine, question, params) for params in (*every_params.values(), plain)]
            answers = await asyncio.gather(*map(tokens, handles))
            assert dict(zip(every_params, answers, strict=False)) == expected
            assert answers[-1] == plain_answer
        assert engine.stats().num_cached_tokens > 0
        await until(lambda: is_idle(engine))
        processor = engine._executor._logits_processor
        assert len(processor._counts._free) == len(processor._counts.rows_RV) > 0, "rows are released"


async def test_preempted_answers_are_the_same(qwen3_vl_folder: Path, question: Request) -> None:
    """A token that was sampled but not known yet when its request was preempted does not count twice."""
    drawn = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.5, frequency_penalty=2.0, bad_words=((4, 5),))
    every = [replace(drawn, seed=seed) for seed in range(8)]
    with running_engine(qwen3_vl_folder) as engine:
        alone = [await tokens(submit(engine, question, params)) for params in every]
    num_blocks = -(-(len(question.prompt.token_ids) + NUM_TOKENS) // 8) * 2
    with running_engine(qwen3_vl_folder, Followed, num_blocks=num_blocks, prefix_cache=False) as engine:
        assert await asyncio.gather(*(tokens(submit(engine, question, params)) for params in every)) == alone
        assert engine.stats().num_preempted > 0


async def test_answers_behind_a_prompt_that_was_computed_elsewhere_equal_transformers(
    qwen3_vl_folder: Path, question: Request, every_params: dict[str, SamplingParams], expected: dict[str, list[int]]
) -> None:
    """The first token, which the other engine sampled, counts."""
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder, Followed, num_blocks=256) as second:
        done = [await prefilled(first, question, params.first_token_only()) for params in every_params.values()]
        running = [
            Continued(second, question, params, each) for params, each in zip(every_params.values(), done, strict=True)
        ]
        answers = await asyncio.gather(*(tokens(each.handle) for each in running))
        assert dict(zip(every_params, answers, strict=True)) == expected


async def test_a_seed_draws_the_same(qwen3_vl_folder: Path, question: Request) -> None:
    """Overlapped, preempted, and beside other requests."""
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=1.5, seed=3, min_p=0.02, presence_penalty=1.0, bad_words=((5, 6),)
    )
    seeds = [replace(params, seed=seed) for seed in range(6)]
    with running_engine(qwen3_vl_folder) as engine:
        one_by_one = [await tokens(submit(engine, question, each)) for each in seeds]
    num_blocks = -(-(len(question.prompt.token_ids) + NUM_TOKENS) // 8) * 3

    async def together(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(tokens(submit(engine, question, each)) for each in seeds))

    with running_engine(qwen3_vl_folder, Followed, num_blocks=num_blocks, prefix_cache=False) as engine:
        assert await together(engine) == one_by_one
        assert engine.stats().num_preempted > 0
    assert len({tuple(answer) for answer in one_by_one}) == len(seeds)


async def test_logprobs_are_of_the_models_own_distribution(
    qwen3_vl_folder: Path, reference: Reference, question: Request, plain_answer: list[int]
) -> None:
    """As vLLM's default, raw_logprobs: before anything that changes logits."""
    _, expected_TV = reference.greedy(question.inputs, 1)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, logit_bias={plain_answer[0]: -100.0})
    with running_engine(qwen3_vl_folder) as engine:
        (output,) = await collect(submit(engine, question, params))
    assert output.token_id != plain_answer[0] and output.logprobs is not None
    assert output.logprobs.top[0][0] == plain_answer[0]
    assert output.logprobs.logprob == pytest.approx(float(expected_TV[0, output.token_id]), abs=1e-3)


async def test_stop_tokens_end_an_answer_from_min_tokens_on(
    qwen3_vl_folder: Path, question: Request, plain_answer: list[int]
) -> None:
    everything = frozenset(plain_answer)
    with running_engine(qwen3_vl_folder) as engine:
        for min_tokens in (0, 1, 5):
            params = SamplingParams(
                max_tokens=NUM_TOKENS, temperature=0.0, min_tokens=min_tokens, stop_token_ids=everything
            )
            outputs = await collect(submit(engine, question, params))
            if not min_tokens:
                assert [each.token_id for each in outputs] == plain_answer[:1]
            assert len(outputs) > min_tokens
            assert all(each.token_id not in everything for each in outputs[:min_tokens])
