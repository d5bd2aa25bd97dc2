"""The engine's tokens and log-probabilities equal transformers', whatever the chunk size and the other requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integration.test_parity import CASES
from tests.llm_worker.engine.harness import collect, greedy, request_for, running_engine, submit, tokens
from vitrine_vlm.sample_models.reference import Reference

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def reference(checkpoint_folder: Path) -> Reference:
    return Reference(checkpoint_folder)


def factor(reference: Reference) -> int:
    vision = reference.config.vision_config
    return int(vision.patch_size * vision.spatial_merge_size)


@pytest.mark.parametrize("chunk_size", [7, 48, 2048])
async def test_every_kind_of_prompt(checkpoint_folder: Path, reference: Reference, chunk_size: int) -> None:
    with running_engine(checkpoint_folder, max_num_batched_tokens=chunk_size) as engine:
        for case in CASES.values():
            request = request_for(reference, case.text, case.media(factor(reference)))
            expected_ids, expected_logprobs = reference.greedy(request.inputs, NUM_TOKENS)

            outputs = await collect(submit(engine, request, greedy(NUM_TOKENS, logprobs=3)))

            assert [output.token_id for output in outputs] == expected_ids
            for step, output in enumerate(outputs):
                assert output.logprobs is not None
                for token_id, logprob in output.logprobs.top:
                    assert logprob == pytest.approx(float(expected_logprobs[step, token_id]), abs=1e-3)
            assert [rows.num_releases for rows in request.rows] == [1] * len(request.rows)
            assert engine.stats().kv_blocks_used == 0


async def test_requests_in_one_batch(checkpoint_folder: Path, reference: Reference) -> None:
    requests = [request_for(reference, case.text, case.media(factor(reference))) for case in CASES.values()]
    expected = [reference.greedy(request.inputs, NUM_TOKENS)[0] for request in requests]
    with running_engine(checkpoint_folder, max_num_batched_tokens=64, num_blocks=256) as engine:
        handles = [submit(engine, request, greedy(NUM_TOKENS)) for request in requests]
        assert await asyncio.gather(*map(tokens, handles)) == expected
        assert engine.stats().num_steps < len(requests) * NUM_TOKENS
