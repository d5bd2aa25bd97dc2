"""Sampling parameters that change logits equal transformers' processors on random logits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.llm_worker.engine.reference_processors import processors, warpers
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.logits_processing import LogitsProcessor
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, SamplingParams
from vitrine_vlm.llm_worker.engine.request_parts import SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.sampler import choose
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool

VOCAB_SIZE = 50
CPU = torch.device("cpu")

EVERY_KIND: dict[str, dict[str, Any]] = {
    "none": {},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "negative": {"frequency_penalty": -2.0, "presence_penalty": -0.5},
    "repetition": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 0.8},
    "bias": {"logit_bias": {3: 5.0, 7: -100.0, 9: 0.5}},
    "allowed": {"allowed_token_ids": frozenset(range(10, 40))},
    "bad words": {"bad_words": ((4,), (5, 6), (6, 6), (1, 2, 3), (6,))},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": frozenset([1, 5, 8])},
    "all": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {12: 3.0, 13: -2.0},
        "allowed_token_ids": frozenset(range(5, 45)),
        "bad_words": ((12,), (13, 14), (14, 13)),
        "min_tokens": 5,
        "stop_token_ids": frozenset([20]),
    },
}


def state(key: int, prompt: list[int], answer: list[int], params: SamplingParams) -> RequestState:
    request = RequestState(key, str(key), [], SampledTokens(params), pool_row=key)
    request.set_prompt(ExpandedPrompt(prompt, torch.arange(len(prompt)).expand(3, -1), len(prompt)))
    for token_id in answer:
        request.append_token(token_id)
    return request


def chunk_of(request: RequestState, num_in_flight: int = 0) -> Chunk:
    stop = len(request.token_ids) + num_in_flight
    return Chunk(request, stop - 1, stop, samples=True, epoch=request.epoch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Fails where the host waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_mixed_batch_equals_transformers(in_flight: bool, device: torch.device) -> None:
    """Random answers over few tokens, so that words come up; each grows by a token a step, which the host may not know
    yet when the next step is processed."""
    rng = random.Random(in_flight)
    pool = TokenPool(len(EVERY_KIND), device)
    processor = LogitsProcessor(VOCAB_SIZE, pool)
    every_params = [SamplingParams(temperature=0.0, **fields) for fields in EVERY_KIND.values()]
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(4 + key)] for key in range(len(every_params))]
    requests = [state(key, prompts[key], [], params) for key, params in enumerate(every_params)]
    answers: list[list[int]] = [[] for _ in requests]
    for step in range(12):
        order = rng.sample(range(len(requests)), k=rng.randrange(1, len(requests) + 1))
        if in_flight:  # a request's tokens are processed one step late, as long as it is in every step
            order = list(range(len(requests)))
        logits_BV = torch.randn(len(order), VOCAB_SIZE, generator=torch.Generator().manual_seed(step)) * 3
        chunks = [chunk_of(requests[key], len(answers[key]) - _num_generated(requests[key])) for key in order]
        on_device_BV = logits_BV.to(device)
        with no_waiting(device):
            processed_on_device_BV = processor.process(chunks, on_device_BV)
        processed_BV = processed_on_device_BV.cpu()
        for row, key in enumerate(order):
            tokens_so_far = torch.tensor([prompts[key] + answers[key]])
            expected_1V = processors(every_params[key], len(prompts[key]))(tokens_so_far, logits_BV[row : row + 1])
            torch.testing.assert_close(processed_BV[row : row + 1], expected_1V)
        chosen_B = torch.tensor([rng.choice([4, 5, 6, 1, 2, 3, 12, 13, 14]) for _ in order])
        rows_B, on_device_B = torch.tensor(order, device=device), chosen_B.to(device)
        with no_waiting(device):
            pool.write(rows_B, on_device_B)
            processor.count(chunks, on_device_B)
        for key, token_id in zip(order, chosen_B.tolist(), strict=True):
            if in_flight and answers[key]:
                requests[key].append_token(answers[key][-1])
            answers[key].append(token_id)
            if not in_flight:
                requests[key].append_token(token_id)


def _num_generated(request: RequestState) -> int:
    return len(request.token_ids) - request.num_prompt_tokens


def test_a_row_is_used_again_and_holds_nothing_of_its_last_request() -> None:
    pool = TokenPool(8, CPU)
    processor = LogitsProcessor(VOCAB_SIZE, pool)
    logits_1V = torch.ones(1, VOCAB_SIZE)
    params = SamplingParams(presence_penalty=1.0, logit_bias={3: 1.0})
    for key in range(4):
        chunk = chunk_of(state(key, [1, 2], [4 + key], params))
        expected_V = torch.ones(VOCAB_SIZE)
        expected_V[3], expected_V[4 + key] = 2.0, 0.0
        assert torch.equal(processor.process([chunk], logits_1V)[0], expected_V)
        processor.count([chunk], torch.tensor([9]))
        processor.release(key)
    assert len(processor._counts.rows_RV) == len(processor._bias.rows_RV) == 1


def test_memory_doubles_and_rows_keep_their_content() -> None:
    processor = LogitsProcessor(VOCAB_SIZE, TokenPool(8, CPU))
    params = SamplingParams(frequency_penalty=1.0)
    requests = [state(key, [1], [key, key], params) for key in range(5)]
    for last in range(1, 6):
        chunks = [chunk_of(request) for request in requests[:last]]
        processed_BV = processor.process(chunks, torch.zeros(last, VOCAB_SIZE))
        expected_BV = torch.zeros(last, VOCAB_SIZE)
        expected_BV[range(last), range(last)] = -2.0
        assert torch.equal(processed_BV, expected_BV)
    assert len(processor._counts.rows_RV) == 8


class Launched(TorchDispatchMode):
    """`names`: of all operators that were called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_without_such_requests_launches_nothing_for_them(temperature: float) -> None:
    """And for a greedy step nothing but the choice of the most probable tokens."""
    processor = LogitsProcessor(VOCAB_SIZE, TokenPool(8, CPU))
    params = SamplingParams(temperature=temperature, stop_token_ids=frozenset([3]), top_k=5, top_p=0.9)
    chunks = [chunk_of(state(key, [1, 2], [3], params)) for key in range(4)]
    logits_BV = torch.randn(4, VOCAB_SIZE).bfloat16()
    with Launched() as launched:
        processed_BV = processor.process(chunks, logits_BV)
        assert launched.names == []
        choice = choose(processed_BV, [params] * 4, [0.5] * 4, logits_BV)
        num_of_choice = len(launched.names)
        processor.count(chunks, choice.token_ids_B)
    assert processed_BV is logits_BV
    assert len(launched.names) == num_of_choice
    if not temperature:
        assert launched.names == ["aten::argmax"]
    assert processor._counts.rows_RV.numel() == processor._bias.rows_RV.numel() == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.05, "top_p": 0.8},
        {"min_p": 0.1, "top_k": 4, "temperature": 0.7},
        {"min_p": 0.3, "temperature": 3.0, "top_k": 3, "top_p": 0.9},
    ],
)
def test_min_p_draws_from_what_transformers_leaves(fields: dict[str, Any], device: torch.device) -> None:
    num_draws = 4096
    params = SamplingParams(**fields)
    logits_1V = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 2
    expected_V = warpers(params)(torch.zeros(1, 1, dtype=torch.int64), logits_1V.clone())[0].softmax(-1)
    places = [(index + 0.5) / num_draws for index in range(num_draws)]
    beside = SamplingParams(temperature=1.0)  # whose draws stay as they are
    logits_BV = logits_1V.expand(num_draws + 1, -1).to(device)
    with no_waiting(device):
        choice = choose(logits_BV, [*[params] * num_draws, beside], [*places, 0.37])
    token_ids_B = choice.token_ids_B.cpu()
    frequencies_V = torch.bincount(token_ids_B[:-1], minlength=VOCAB_SIZE) / num_draws
    torch.testing.assert_close(frequencies_V, expected_V, atol=1 / num_draws, rtol=0)
    assert token_ids_B[-1] == choose(logits_1V, [beside], [0.37]).token_ids_B[0]
