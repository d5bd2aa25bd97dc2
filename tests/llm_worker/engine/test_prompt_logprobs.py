"""Log-probabilities of a prompt's tokens equal those of transformers' model, however the prompt is computed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.harness import (
    Request,
    collect,
    greedy,
    is_idle,
    running_engine,
    submit,
    submit_with_rows_at_hand,
    tokens,
    unsent,
    until,
)
from tests.llm_worker.engine.tensor_rows import TensorRows
from tests.llm_worker.engine.test_following_steps import Followed, again
from vitrine_vlm.errors import LeaseExpired
from vitrine_vlm.llm_worker.engine import prompt_logprobs
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, SamplingParams, TokenLogprobs
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.sample_models.reference import Reference

NUM_TOP = 3
SCORED = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=NUM_TOP)


def check(reference: Reference, request: Request, handle: RequestHandle, num_top: int = NUM_TOP) -> None:
    check_logprobs(expected_logprobs(reference, request), request, handle.prompt_logprobs, num_top)


def expected_logprobs(reference: Reference, request: Request) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = reference.model(**request.inputs).logits
    return logits[0, :-1].log_softmax(-1)


def check_logprobs(
    expected_TV: torch.Tensor, request: Request, logprobs: list[TokenLogprobs], num_top: int = NUM_TOP
) -> None:
    following = torch.tensor(request.prompt.token_ids[1:])
    assert [each.token_id for each in logprobs] == following.tolist()
    own_T = torch.tensor([each.logprob for each in logprobs])
    torch.testing.assert_close(own_T, expected_TV.gather(1, following[:, None])[:, 0], atol=1e-3, rtol=0)
    if num_top:
        top_TK = torch.tensor([[value for _, value in each.top] for each in logprobs])
        torch.testing.assert_close(top_TK, expected_TV.topk(num_top).values, atol=1e-3, rtol=0)
        top_ids_TK = torch.tensor([[token_id for token_id, _ in each.top] for each in logprobs])
        torch.testing.assert_close(top_TK, expected_TV.gather(1, top_ids_TK), atol=1e-3, rtol=0)
    else:
        assert all(not each.top for each in logprobs)


@pytest.mark.parametrize("make_runner", [PlainRunner, Followed])
@pytest.mark.parametrize("chunk_size", [7, 48, 2048])
async def test_they_equal_transformers(
    qwen3_vl_folder: Path,
    reference: Reference,
    image: Request,
    text: Request,
    make_runner: MakeRunner,
    chunk_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside requests that ask for none; the second time with a cached prompt, which is computed again."""
    monkeypatch.setattr(prompt_logprobs, "_NUM_AT_ONCE", 5)
    image = replace(image, prompt=replace(image.prompt, content_hashes=(b"picture",)))
    expected = reference.greedy(image.inputs, 4)[0], reference.greedy(text.inputs, 4)[0]
    with running_engine(qwen3_vl_folder, make_runner, max_num_batched_tokens=chunk_size, num_blocks=256) as engine:
        for num_top in (NUM_TOP, 0):
            scored = replace(SCORED, prompt_logprobs=num_top)
            plain = submit(engine, text, greedy(4))
            handles = [submit(engine, again(image), scored), submit(engine, text, scored)]
            assert tuple(await asyncio.gather(*map(tokens, handles))) == expected
            assert await tokens(plain) == expected[1]
            for request, handle in zip((image, text), handles, strict=True):
                check(reference, request, handle, num_top)
                assert handle.timings.num_cached_tokens == 0
            assert plain.prompt_logprobs == []
        await tokens(again_cached := submit(engine, again(image), greedy(4)))
        assert again_cached.timings.num_cached_tokens > 0, "their blocks are cached for others"


async def test_preempted_requests_have_each_once(qwen3_vl_folder: Path, reference: Reference, text: Request) -> None:
    scored = replace(SCORED, max_tokens=30)
    num_blocks = -(-(len(text.prompt.token_ids) + 30) // 8) * 2
    with running_engine(qwen3_vl_folder, Followed, num_blocks=num_blocks, max_num_batched_tokens=16) as engine:
        handles = [submit(engine, text, scored) for _ in range(4)]
        await asyncio.gather(*map(collect, handles))
        assert engine.stats().num_preempted > 0
        for handle in handles:
            check(reference, text, handle)


async def test_with_memory_for_one_picture(qwen3_vl_folder: Path, reference: Reference, image: Request) -> None:
    """Prompts are preempted in their middle, with some of their log-probabilities known."""
    num_blocks = -(-len(image.prompt.token_ids) // 8) + 2
    with running_engine(
        qwen3_vl_folder, Followed, num_blocks=num_blocks, max_num_batched_tokens=16, prefix_cache=False
    ) as engine:
        handles = [submit_with_rows_at_hand(engine, image, SCORED) for _ in range(3)]
        await asyncio.gather(*map(collect, handles))
        for handle in handles:
            check(reference, image, handle)
        await until(lambda: is_idle(engine))


async def test_embeddings_that_were_lost_in_an_overlapped_step(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder, Followed, max_num_batched_tokens=16) as engine:
        coming = [TensorRows(torch.zeros(12, 1), error=LeaseExpired("lease 1 is over")), image.rows[0]]
        handle: RequestHandle = engine.submit(
            "expired", image.prefix, SCORED, lambda items: handle.set_embeddings(0, coming.pop(0))
        )
        handle.set_prompt(image.prompt)
        handle.set_embeddings(0, coming.pop(0))
        await collect(handle)
        check(reference, image, handle)


async def test_the_text_in_front_of_media_is_scored_before_the_prompt_is_known(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        handle = engine.submit("early", image.prefix, SCORED, unsent)
        await until(lambda: engine.stats().num_prefill_tokens == len(image.prefix) - 1)
        handle.set_prompt(image.prompt)
        handle.set_embeddings(0, image.rows[0])
        await collect(handle)
        check(reference, image, handle)


async def test_a_prompt_of_one_token_has_none(qwen3_vl_folder: Path) -> None:
    with running_engine(qwen3_vl_folder) as engine:
        prompt = ExpandedPrompt([5], torch.zeros(3, 1, dtype=torch.int64), 1)
        handle = engine.submit("short", [], SCORED, unsent, prompt=prompt)
        assert len(await tokens(handle)) == 4
        assert handle.prompt_logprobs == []
