"""Steps that are launched before the last one ends and before its tokens are known: the tokens are the same, and lost
embeddings are not used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.harness import (
    Request,
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
from vitrine_vlm.errors import LeaseExpired
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.engine.runner import PlainRunner
from vitrine_vlm.sample_models.reference import Reference

NUM_REQUESTS = 12


class Followed(PlainRunner):
    """A runner whose steps count as nearly done, so that others are launched before their results are processed."""

    def wait_until_nearly_done(self) -> bool:
        return True


def again(request: Request) -> Request:
    """The request with embeddings of its own."""
    return replace(request, rows=[TensorRows(rows._rows_TW) for rows in request.rows])


@pytest.mark.parametrize("max_tokens", [1, 6])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 64])
async def test_greedy_tokens_equal_transformers(
    qwen3_vl_folder: Path,
    reference: Reference,
    image: Request,
    text: Request,
    max_tokens: int,
    max_num_batched_tokens: int,
) -> None:
    requests = [again(image) if index % 3 else text for index in range(NUM_REQUESTS)]
    expected = [reference.greedy(request.inputs, max_tokens)[0] for request in requests]
    with running_engine(qwen3_vl_folder, Followed, max_num_batched_tokens=max_num_batched_tokens) as engine:
        handles = [submit(engine, request, greedy(max_tokens)) for request in requests]
        assert await asyncio.gather(*map(tokens, handles)) == expected
        assert is_idle(engine)
        num_prompt = sum(len(request.prompt.token_ids) for request in requests)
        assert engine.stats().num_prefill_tokens + engine.stats().num_cached_tokens == num_prompt
        assert engine.stats().num_decode_tokens == NUM_REQUESTS * (max_tokens - 1)
    assert all(rows.num_releases == 1 for request in requests for rows in request.rows)


async def test_nothing_comes_behind_a_stop_token(qwen3_vl_folder: Path, reference: Reference, text: Request) -> None:
    """When the stop token is known, the next step has been launched with it."""
    expected = reference.greedy(text.inputs, 12)[0]
    stop = expected[5]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=frozenset([stop]))
    with running_engine(qwen3_vl_folder, Followed) as engine:
        for _ in range(2):  # and the KV behind it is not in the cache for the next
            handles = [submit(engine, text, sampling), submit(engine, text, greedy(12))]
            stopped, whole = await asyncio.gather(*map(tokens, handles))
            assert stopped == expected[: expected.index(stop) + 1]
            assert whole == expected
        assert is_idle(engine)


async def test_the_last_token_of_an_answer_is_not_computed(qwen3_vl_folder: Path, text: Request) -> None:
    with running_engine(qwen3_vl_folder, Followed) as engine:
        await tokens(engine.submit("alone", [], greedy(5), unsent, prompt=text.prompt))
        await until(lambda: is_idle(engine))
        assert engine.stats().num_steps == 5


async def test_no_time_counts_for_two_steps(qwen3_vl_folder: Path, image: Request) -> None:
    """A step waits for the one in front once it is launched: its chunks take no longer than all until its token."""
    with running_engine(qwen3_vl_folder, Followed, max_num_batched_tokens=16, prefix_cache=False) as engine:
        handles = [submit(engine, again(image), greedy(3)) for _ in range(3)]
        await asyncio.gather(*map(tokens, handles))
    for handle in handles:
        assert 0 < handle.timings.prefill_ms <= handle.timings.ttft_ms


async def test_a_preempted_answer_goes_on_with_the_same_tokens(
    qwen3_vl_folder: Path, reference: Reference, text: Request
) -> None:
    """Also where tokens are drawn: one that was not known yet when its request was preempted is drawn again."""
    num_prompt = len(text.prompt.token_ids)
    sampling = [SamplingParams(max_tokens=40, temperature=1.5, seed=seed) for seed in range(4)]
    with running_engine(qwen3_vl_folder) as engine:
        expected = [await tokens(submit(engine, text, each)) for each in sampling]
    with running_engine(
        qwen3_vl_folder, Followed, num_blocks=-(-(num_prompt + 40) // 8) * 2, prefix_cache=False
    ) as engine:
        handles = [submit(engine, text, each) for each in sampling]
        assert await asyncio.gather(*map(tokens, handles)) == expected
        assert engine.stats().num_preempted > 0
        assert is_idle(engine)


@pytest.mark.parametrize("max_tokens", [1, 6])
async def test_a_seed_draws_the_same(qwen3_vl_folder: Path, text: Request, max_tokens: int) -> None:
    async def drawn(engine: Engine) -> list[list[int]]:
        seeds = [SamplingParams(max_tokens=max_tokens, temperature=1.5, seed=seed) for seed in range(NUM_REQUESTS)]
        return await asyncio.gather(*(tokens(submit(engine, text, each)) for each in seeds))

    with running_engine(qwen3_vl_folder) as one, running_engine(qwen3_vl_folder, Followed) as other:
        assert await drawn(one) == await drawn(other)


@pytest.mark.parametrize("max_tokens", [1, 6])
async def test_with_memory_for_two_all_finish(
    qwen3_vl_folder: Path, reference: Reference, image: Request, max_tokens: int
) -> None:
    expected = reference.greedy(image.inputs, max_tokens)[0]
    num_blocks = 2 * -(-len(image.prompt.token_ids) // 8) + 1
    with running_engine(
        qwen3_vl_folder, Followed, num_blocks=num_blocks, max_num_batched_tokens=16, prefix_cache=False
    ) as engine:
        handles = [submit_with_rows_at_hand(engine, image, greedy(max_tokens)) for _ in range(NUM_REQUESTS)]
        assert await asyncio.gather(*map(tokens, handles)) == [expected] * NUM_REQUESTS
        assert is_idle(engine)


class WatchedRows(TensorRows):
    """`checked`: for each step that landed some of them, whether its own check was made."""

    def __init__(self, rows_TW: torch.Tensor) -> None:
        super().__init__(rows_TW)
        self.checked: list[bool] = []

    def queue_check(self) -> Callable[[], None]:
        step = len(self.checked)
        self.checked.append(False)

        def check() -> None:
            assert self.checked == [True] * step + [False] * (len(self.checked) - step)
            self.checked[step] = True

        return check


async def test_every_step_checks_the_embeddings_that_it_landed(
    qwen3_vl_folder: Path, reference: Reference, image: Request
) -> None:
    """The next step has landed others of the same item by then, and the GPU has not checked these yet."""
    rows = WatchedRows(image.rows[0]._rows_TW)
    with running_engine(qwen3_vl_folder, Followed, max_num_batched_tokens=4) as engine:
        handle = submit(engine, replace(image, rows=[rows]), greedy(2))
        assert await tokens(handle) == reference.greedy(image.inputs, 2)[0]
        assert rows.checked == [True] * len(rows.checked) and len(rows.checked) > 2


@pytest.mark.parametrize("max_tokens", [1, 6])
async def test_embeddings_that_were_lost_in_an_overlapped_step_are_requested_again(
    qwen3_vl_folder: Path, reference: Reference, image: Request, text: Request, max_tokens: int
) -> None:
    """In chunks of 16: later chunks are computed from the lost ones before the loss is noticed."""
    with running_engine(qwen3_vl_folder, Followed, max_num_batched_tokens=16) as engine:
        lost = [TensorRows(torch.zeros(12, 1), error=LeaseExpired("lease 1 is over")) for _ in range(2)]
        coming = [*lost, image.rows[0]]
        handle: RequestHandle = engine.submit(
            "expired", image.prefix, greedy(max_tokens), lambda items: handle.set_embeddings(0, coming.pop(0))
        )
        handle.set_prompt(image.prompt)
        handle.set_embeddings(0, coming.pop(0))
        others = [submit(engine, text, greedy(1)) for _ in range(4)]
        assert await tokens(handle) == reference.greedy(image.inputs, max_tokens)[0]
        assert await asyncio.gather(*map(tokens, others)) == [reference.greedy(text.inputs, 1)[0]] * 4
        assert [rows.num_releases for rows in (*lost, image.rows[0])] == [1, 1, 1]


async def test_cancelling_a_request_in_flight_frees_everything(
    qwen3_vl_folder: Path, reference: Reference, image: Request, text: Request
) -> None:
    with running_engine(qwen3_vl_folder, Followed, max_num_batched_tokens=16) as engine:
        for wait_ms in range(12):  # at any moment of it
            request = again(image)
            handle = submit(engine, request, greedy(1 + wait_ms))
            other = submit(engine, text, greedy(1))
            await asyncio.sleep(wait_ms / 1000)
            handle.cancel()
            assert await tokens(other) == reference.greedy(text.inputs, 1)[0]
            await until(lambda: is_idle(engine))
            assert request.rows[0].num_releases == 1


async def test_late_embeddings_delay_no_other_request(
    qwen3_vl_folder: Path, reference: Reference, image: Request, text: Request
) -> None:
    with running_engine(qwen3_vl_folder, Followed) as engine:
        late = engine.submit("late", image.prefix, greedy(1), unsent)
        late.set_prompt(image.prompt)
        assert await tokens(submit(engine, text, greedy(1))) == reference.greedy(text.inputs, 1)[0]
        late.set_embeddings(0, image.rows[0])
        assert await tokens(late) == reference.greedy(image.inputs, 1)[0]
