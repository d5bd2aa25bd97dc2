"""Engines whose KV cache is in FP8: nearly the answers of others, and prompts that another such engine continues."""

from __future__ import annotations

import asyncio
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy.questions import held_out_questions
from tests.llm_worker.engine.harness import (
    Request,
    greedy,
    input_buffer,
    is_idle,
    request_for,
    request_state,
    running_engine,
    submit,
    tokens,
    until,
)
from tests.llm_worker.engine.test_prefilled_elsewhere import Continued, prefilled
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.runner import PlainRunner
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import Reference
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
NUM_QUESTIONS, NUM_TOKENS = 8, 6
MIN_SAME = 0.9


@pytest.fixture(scope="module")
def tiny() -> Reference:
    return Reference(MODEL_FOLDER)


@pytest.fixture(scope="module")
def questions(tiny: Reference) -> list[Request]:
    found = []
    for asked in held_out_questions(NUM_QUESTIONS):
        content = [*({"type": item.kind} for item in asked.media), {"type": "text", "text": asked.text}]
        messages = [{"role": "user", "content": content}]
        text = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found.append(request_for(tiny, text, list(asked.media)))
    return found


async def test_the_tiny_model_gives_nearly_the_same_tokens(questions: list[Request]) -> None:
    answers: list[list[int]] = []
    for kv_cache_dtype in ("auto", "fp8"):
        with running_engine(MODEL_FOLDER, num_blocks=512, kv_cache_dtype=kv_cache_dtype) as engine:
            handles = [submit(engine, fresh(each), greedy(NUM_TOKENS)) for each in questions]
            answers.append(list(chain.from_iterable(await asyncio.gather(*map(tokens, handles)))))
            assert is_idle(engine)
    same = sum(map(int.__eq__, *answers)) / len(answers[0])
    print(f"{same:.1%} of {len(answers[0])} tokens are the same")
    assert same >= MIN_SAME


def fresh(request: Request) -> Request:
    """With embeddings of its own: they are released once they have landed."""
    rows = [type(each)(each._rows_TW) for each in request.rows]
    return Request(request.prompt, rows, request.inputs)


@torch.inference_mode()
def test_hidden_states_are_close_to_those_with_a_plain_cache(questions: list[Request]) -> None:
    decoder = build_decoder(open_checkpoint(str(MODEL_FOLDER)), CPU, torch.float32)
    request = questions[0]
    num_tokens = len(request.prompt.token_ids)
    states: list[torch.Tensor] = []
    for dtype in (torch.float32, FP8):
        cache, buffer = KvCache(decoder.config, 64, 16, CPU, dtype), input_buffer(decoder, num_tokens)
        runner, state = PlainRunner(decoder, cache, buffer), request_state(request.prompt, fresh(request).rows)
        cache.append_slots(state.table, num_tokens)
        # The second chunk attends to the first one's keys and values in the cache.
        cuts = pairwise((0, num_tokens // 2, num_tokens))
        states.append(torch.cat([runner(buffer.write([Chunk(state, *each, False)]).inputs) for each in cuts]))
    cosine = F.cosine_similarity(states[0], states[1], dim=1)
    print(f"cosine to a plain cache: {cosine.min():.5f} at least, {cosine.mean():.5f} in the mean")
    assert 0.99 < cosine.min() < 0.99999


async def test_a_prompt_is_continued_by_another_engine(qwen3_vl_folder: Path, image: Request) -> None:
    with running_engine(qwen3_vl_folder, kv_cache_dtype="fp8") as alone:
        expected = await tokens(submit(alone, fresh(image), greedy(24)))
    with (
        running_engine(qwen3_vl_folder, kv_cache_dtype="fp8") as first,
        running_engine(qwen3_vl_folder, kv_cache_dtype="fp8", block_size=16) as second,
    ):
        done = await prefilled(first, image, greedy(24))
        assert done.kv.dtype == FP8
        assert await tokens(Continued(second, image, greedy(24), done).handle) == expected
        assert second.stats().num_prefill_tokens == 0
        await until(lambda: is_idle(second))


async def test_blocks_in_fp8_are_used_again(qwen3_vl_folder: Path, text: Request) -> None:
    with running_engine(qwen3_vl_folder, kv_cache_dtype="fp8") as engine:
        first, again = [await tokens(submit(engine, text, greedy(4))) for _ in range(2)]
        assert engine.stats().num_cached_tokens >= 8
        assert first == again
