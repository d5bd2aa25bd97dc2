"""A prompt computed by one engine and continued by another, whose blocks have another size."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.harness import (
    Request,
    collect,
    greedy,
    is_idle,
    running_engine,
    tokens,
    unsent,
    until,
)
from tests.llm_worker.engine.tensor_rows import TensorRows
from tests.llm_worker.engine.test_following_steps import Followed
from vitrine_vlm.errors import InternalError, LeaseExpired
from vitrine_vlm.llm_worker.engine import step_executor
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.engine.request_parts import RemoteKv, SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.llm_worker.engine.sampler import NextToken
from vitrine_vlm.llm_worker.models.decoder import StepInputs
from vitrine_vlm.sample_models.reference import Reference
from vitrine_vlm.service_runtime.supervisor import Supervisor

# Steps one after the other, and such as are launched while what the last one landed is not checked yet.
RUNNERS = [PlainRunner, Followed]


@dataclass
class Prefilled:
    first: NextToken
    kv: torch.Tensor


async def prefilled(engine: Engine, request: Request, sampling: SamplingParams) -> Prefilled:
    handle = engine.submit("prefill", request.prefix, replace(sampling, max_tokens=1), unsent, keep_kv=True)
    handle.set_prompt(request.prompt)
    for index, rows in enumerate(request.rows):
        handle.set_embeddings(index, rows)
    (output,) = await collect(handle)
    kv = handle.kv()
    assert engine.stats().kv_blocks_used > 0, "its blocks may not be given to others before it is cancelled"
    rows_TW = torch.full(kv.shape, torch.nan).to(kv.dtype)
    kv.copy_to(rows_TW)
    assert torch.equal(rows_TW.view(torch.uint8), kv.on_host().view(torch.uint8))
    handle.cancel()
    await until(lambda: is_idle(engine))
    return Prefilled(NextToken(output.token_id, output.logprobs), rows_TW)


class Continued:
    """A request of the decoding engine, which gets `prefilled` whenever it is requested, at most `limit` times.

    Args:
        known: the prompt is known before its KV is requested.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        sampling: SamplingParams,
        prefilled: Prefilled,
        limit: int = 99,
        known: bool = False,
    ) -> None:
        self.rows: list[TensorRows] = []
        self.first_rows: list[int] = []
        self.errors: list[Exception] = []
        self._request, self._prefilled, self._limit, self._known = request, prefilled, limit, known
        prefix, prompt = ([], request.prompt) if known else (request.prefix, None)
        self.handle: RequestHandle = engine.submit("decode", prefix, sampling, unsent, self._send_kv, prompt=prompt)

    def _send_kv(self, first_row: int) -> None:
        self.first_rows.append(first_row)
        if len(self.rows) == self._limit:
            return
        if not self.rows and not self._known:
            self.handle.set_prompt(self._request.prompt)
        self.handle.set_first_token(self._prefilled.first, 5.0, 3)
        self.rows.append(TensorRows(self._prefilled.kv[first_row:], self.errors.pop() if self.errors else None))
        self.handle.set_kv(self.rows[-1])


@pytest.mark.parametrize("kind", ["text", "image"])
async def test_tokens_and_logprobs_are_those_of_one_engine(
    qwen3_vl_folder: Path, reference: Reference, kind: str, request: pytest.FixtureRequest
) -> None:
    asked: Request = request.getfixturevalue(kind)
    expected_ids, expected_logprobs = reference.greedy(asked.inputs, 24)
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder, block_size=16) as second:
        done = await prefilled(first, asked, greedy(24, logprobs=0))
        continued = Continued(second, asked, greedy(24, logprobs=0), done)
        outputs = await collect(continued.handle)
        assert [each.token_id for each in outputs] == expected_ids
        logprobs = [each.logprobs.logprob for each in outputs if each.logprobs is not None]
        expected = expected_logprobs[torch.arange(24), torch.tensor(expected_ids)]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=1e-4)
        assert [rows.num_releases for rows in continued.rows] == [1]
        timings = continued.handle.timings
        assert (timings.prefill_ms, timings.num_cached_tokens) == (5.0, 3)
        assert timings.land_ms > 0
        assert second.stats().num_prefill_tokens == 0
        await until(lambda: is_idle(second))


async def test_seeded_sampling_goes_on_where_the_first_engine_stopped(qwen3_vl_folder: Path, text: Request) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=1.5, seed=7)
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder, block_size=16) as second:
        done = await prefilled(first, text, sampling)
        handle = first.submit("one engine", [], sampling, unsent)
        handle.set_prompt(text.prompt)
        assert await tokens(Continued(second, text, sampling, done).handle) == await tokens(handle)


async def test_a_first_token_that_is_the_last_needs_no_kv(qwen3_vl_folder: Path, text: Request) -> None:
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder) as second:
        done = await prefilled(first, text, greedy(8))
        assert done.first.token_id is not None
        for sampling in (greedy(1), replace(greedy(8), stop_token_ids=frozenset([done.first.token_id]))):
            continued = Continued(second, text, sampling, done)
            (output,) = await collect(continued.handle)
            assert (output.token_id, sampling.is_last(output.token_id)) == (done.first.token_id, True)
            await until(lambda continued=continued: continued.rows[0].num_releases == 1)  # type: ignore[misc]
            assert is_idle(second)


@pytest.mark.parametrize("runner", RUNNERS)
async def test_lost_kv_is_requested_again_but_not_for_ever(
    qwen3_vl_folder: Path, reference: Reference, text: Request, runner: MakeRunner
) -> None:
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder, runner) as second:
        done = await prefilled(first, text, greedy(8))
        continued = Continued(second, text, greedy(8), done)
        continued.errors = [LeaseExpired("gone") for _ in range(3)]
        assert await tokens(continued.handle) == reference.greedy(text.inputs, 8)[0]
        assert [rows.num_releases for rows in continued.rows] == [1, 1, 1, 1]

        for error, raised in ((LeaseExpired("gone"), LeaseExpired), (RuntimeError("a bug"), InternalError)):
            other = replace(text, prompt=replace(text.prompt, token_ids=text.prompt.token_ids[::-1]))
            continued = Continued(second, other, greedy(8), done)
            continued.errors = [error] * 9
            with pytest.raises(raised):
                await collect(continued.handle)
            await until(lambda: is_idle(second))


@pytest.mark.parametrize("runner", RUNNERS)
async def test_a_preempted_request_gets_its_prompt_again_and_computes_only_what_it_generated(
    qwen3_vl_folder: Path, reference: Reference, text: Request, image: Request, runner: MakeRunner
) -> None:
    """Without a prefix cache nothing is left of a prompt once its blocks are released."""
    num_blocks = -(-(len(text.prompt.token_ids) + 40) // 8) + len(image.prompt.token_ids) // 8 + 2
    with (
        running_engine(qwen3_vl_folder) as first,
        running_engine(qwen3_vl_folder, runner, num_blocks=num_blocks, prefix_cache=False) as second,
    ):
        both = [await prefilled(first, each, greedy(40)) for each in (text, image)]
        running = [Continued(second, each, greedy(40), done) for each, done in zip((text, image), both, strict=True)]
        got = await asyncio.gather(*(tokens(each.handle) for each in running))
        assert got == [reference.greedy(each.inputs, 40)[0] for each in (text, image)]
        assert second.stats().num_preempted > 0
        assert sum(len(each.rows) for each in running) > 2
        assert all(rows.num_releases == 1 for each in running for rows in each.rows)
        assert second.stats().num_prefill_tokens == 0


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("max_landed_nbytes", "num_steps"), [(1 << 20, 5), (1, 7)])
async def test_prompts_that_come_together_land_in_front_of_one_step(
    qwen3_vl_folder: Path,
    reference: Reference,
    text: Request,
    runner: MakeRunner,
    max_landed_nbytes: int,
    num_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many as the limit allows, and at least one; they decode in that step."""
    monkeypatch.setattr(step_executor, "_MAX_LANDED_NBYTES", max_landed_nbytes)
    with (
        running_engine(qwen3_vl_folder) as first,
        running_engine(qwen3_vl_folder, runner, start=False) as second,
    ):
        done = await prefilled(first, text, greedy(6))
        continued = [Continued(second, text, greedy(6), done, known=True) for _ in range(3)]
        for each in continued:
            each._send_kv(0)
        second.start(Supervisor())
        got = await asyncio.gather(*(tokens(each.handle) for each in continued))
        assert got == [reference.greedy(text.inputs, 6)[0]] * 3
        assert second.stats().num_steps == num_steps
        assert [rows.num_releases for each in continued for rows in each.rows] == [1, 1, 1]
        second.close()


async def test_a_request_that_ends_while_its_kv_lands_releases_it_once(
    qwen3_vl_folder: Path, reference: Reference, text: Request
) -> None:
    """Nor does KV count that was not checked: an equal prompt does not find it in the cache."""
    running: list[Continued] = []

    class Cancelling(Followed):
        """Cancels the first request in the step in front of which its KV lands."""

        def __call__(self, inputs: StepInputs) -> torch.Tensor:
            running[0].handle.cancel()
            return super().__call__(inputs)

    with (
        running_engine(qwen3_vl_folder) as first,
        running_engine(qwen3_vl_folder, Cancelling, start=False) as second,
    ):
        done = await prefilled(first, text, greedy(8))
        running.append(Continued(second, text, greedy(8), done, known=True))
        running[0]._send_kv(0)
        second.start(Supervisor())
        await until(lambda: running[0].rows[0].num_releases > 0)
        running.append(Continued(second, text, greedy(8), done, known=True))
        assert await tokens(running[1].handle) == reference.greedy(text.inputs, 8)[0]
        assert running[1].first_rows == [0]
        assert [rows.num_releases for each in running for rows in each.rows] == [1, 1]
        await until(lambda: is_idle(second))
        second.close()


@pytest.mark.parametrize("kind", ["text", "image"])
async def test_cached_kv_is_not_requested(
    qwen3_vl_folder: Path, reference: Reference, kind: str, request: pytest.FixtureRequest
) -> None:
    """KV that has landed is in the prefix cache, for a repeated prompt."""
    asked: Request = request.getfixturevalue(kind)
    asked = replace(asked, prompt=replace(asked.prompt, content_hashes=(b"picture",)))
    num_tokens, expected = len(asked.prompt.token_ids), reference.greedy(asked.inputs, 8)[0]
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder) as second:
        done = await prefilled(first, asked, greedy(8))
        assert await tokens(Continued(second, asked, greedy(8), done).handle) == expected
        assert second.stats().kv_blocks_kept >= num_tokens // 8
        for known, first_row in ((False, len(asked.prefix[:-1]) // 8 * 8), (True, (num_tokens - 1) // 8 * 8)):
            continued = Continued(second, asked, greedy(8), done, known=known)
            assert await tokens(continued.handle) == expected
            assert continued.first_rows == [first_row]
            assert continued.rows[0].num_releases == 1
        assert second.stats().num_cached_tokens >= first_row > 0


@pytest.mark.parametrize("is_here", [True, False])
def test_kv_is_requested_again_where_the_kv_in_front_of_it_was_lost(is_here: bool) -> None:
    rows, remote = TensorRows(torch.zeros(8, 4)), RemoteKv()
    request = RequestState(0, "request", [1] * 24, SampledTokens(greedy(8)), remote)
    request.admit()
    request.reuse_prefix(16)
    assert remote.request_missing(request.num_computed) and remote.first_token == 16
    if not is_here:
        request.preempt()
    request.receive_kv(rows, 0.0)
    assert rows.num_releases == 0
    if is_here:
        request.preempt()
    assert remote.request_missing(request.num_computed) and remote.first_token == 0
    assert (rows.num_releases, remote.received) == (1, None)
    assert not remote.request_missing(request.num_computed), "it is to come"


async def test_cancelling_while_the_kv_is_requested_frees_everything(qwen3_vl_folder: Path, text: Request) -> None:
    with running_engine(qwen3_vl_folder) as first, running_engine(qwen3_vl_folder) as second:
        done = await prefilled(first, text, greedy(8))
        continued = Continued(second, text, greedy(8), done, limit=0)
        await until(lambda: second.stats().running == 1)
        assert second.stats().queued_prefill_tokens > 0, "it mirrors what the prefill worker has not computed"
        assert second.stats().num_computing == 0
        continued.handle.cancel()
        await until(lambda: is_idle(second))
        late = TensorRows(done.kv)
        continued.handle.set_kv(late)
        await until(lambda: late.num_releases == 1)

        handle = first.submit("keeps its KV", [], greedy(1), unsent, keep_kv=True)
        handle.set_prompt(text.prompt)
        await tokens(handle)
        assert first.stats().kv_blocks_used > 0
        handle.cancel()
        handle.cancel()
        await until(lambda: is_idle(first))
