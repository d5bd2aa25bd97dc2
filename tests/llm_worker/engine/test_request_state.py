"""The status of a request, by what is known of its prompt, which inputs have come, and which are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.llm_worker.engine.harness import greedy, request_state
from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.errors import InternalError
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan
from vitrine_vlm.llm_worker.engine.request_parts import RemoteKv, SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState, RequestStatus

PROMPT = ExpandedPrompt(
    list(range(20)), torch.arange(20).expand(3, -1), 20, (MediaSpan(0, 4, 3, 0), MediaSpan(1, 10, 3, 0))
)


def rows() -> TensorRows:
    return TensorRows(torch.zeros(3, 1))


def compute(request: RequestState, stop: int, samples: bool = False) -> Chunk:
    chunk = Chunk(request, request.num_computed, stop, samples, request.epoch)
    request.launch(stop, samples)
    return chunk


def test_from_the_queue_to_the_last_token() -> None:
    request = RequestState(0, "request", [], SampledTokens(greedy(4)))
    statuses = [request.status]
    request.set_prompt(PROMPT, announced={0, 1})
    request.limit_length(24)
    statuses.append(request.status)
    request.admit()
    statuses.append(request.status)
    assert request.num_runnable == 4
    compute(request, 4)
    statuses.append(request.status)
    request.receive_embeddings(0, rows())
    statuses.append(request.status)
    assert request.num_runnable == 10
    # Embeddings that come while there are tokens to compute add more of them.
    request.receive_embeddings(1, rows())
    assert request.num_runnable == 20
    compute(request, 20, samples=True)
    statuses.append(request.status)
    assert (request.num_tokens, request.num_runnable) == (21, 21)
    request.finish()
    assert [*statuses, request.status] == [
        RequestStatus.WAITING_FOR_PROMPT,
        RequestStatus.WAITING,
        RequestStatus.PREFILLING,
        RequestStatus.WAITING_FOR_MEDIA,
        RequestStatus.PREFILLING,
        RequestStatus.DECODING,
        RequestStatus.FINISHED,
    ]


def test_early_text_is_computed_except_for_its_last_token() -> None:
    request = RequestState(0, "request", [0, 1, 2, 3], SampledTokens(greedy(4)))
    request.admit()
    assert (request.status, request.num_runnable) == (RequestStatus.PREFILLING, 3)
    compute(request, 3)
    assert request.status is RequestStatus.WAITING_FOR_MEDIA
    with pytest.raises(InternalError, match="does not begin with"):
        request.set_prompt(replace(PROMPT, token_ids=[9] * 20))
    request.set_prompt(PROMPT)
    assert (request.status, request.num_runnable) == (RequestStatus.PREFILLING, 4)


def test_a_prompt_from_elsewhere_waits_for_its_kv() -> None:
    request = RequestState(0, "request", [], SampledTokens(greedy(4)), RemoteKv())
    assert request.status is RequestStatus.WAITING
    request.admit()
    request.set_prompt(PROMPT)
    assert (request.status, request.num_runnable) == (RequestStatus.WAITING_FOR_KV, 0)
    kv, late = rows(), rows()
    request.receive_kv(kv, 0.0)
    compute(request, 20)
    assert (request.status, kv.num_releases) == (RequestStatus.DECODING, 1)
    request.receive_kv(late, 0.0)
    assert late.num_releases == 1


@pytest.mark.parametrize("event", ["lost", "preempted", "finished"])
def test_results_in_flight_are_discarded_after_a_loss(event: str) -> None:
    embeddings = [rows(), rows()]
    request = request_state(PROMPT, embeddings, max_tokens=4)
    request.limit_length(24)
    request.admit()
    first = compute(request, 8)
    request.commit(8)
    assert [each.num_releases for each in embeddings] == [1, 0]
    in_flight = compute(request, 20, samples=True)
    assert [first.is_current, in_flight.is_current, request.num_tokens] == [True, True, 21]
    if event == "lost":
        assert request.lose_inputs(8, 20) == 1
        assert (request.status, request.num_runnable) == (RequestStatus.PREFILLING, 10)
        assert request.media.request_missing(request.prompt, request.num_computed) == [1]
        assert request.lose_inputs(8, 20) == 2
        request.embeddings_landed()
        assert request.lose_inputs(8, 20) == 1
    elif event == "preempted":
        request.preempt()
        assert (request.status, request.num_computed, request.num_tokens) == (RequestStatus.WAITING, 0, 20)
        assert request.media.request_missing(request.prompt, request.num_computed) == [0]
    else:
        request.finish()
    assert [first.is_current, in_flight.is_current] == [False, False]
    assert [each.num_releases for each in embeddings] == [1, 0 if event == "preempted" else 1]


def test_embeddings_that_are_not_needed_are_released_at_once() -> None:
    request = request_state(PROMPT)
    request.admit()
    assert request.reuse_prefix(8) == 8
    needless, needed, twice, late = (rows() for _ in range(4))
    request.receive_embeddings(0, needless)
    request.receive_embeddings(1, needed)
    request.receive_embeddings(1, twice)
    assert [each.num_releases for each in (needless, needed, twice)] == [1, 0, 1]
    request.finish()
    request.receive_embeddings(0, late)
    assert (needed.num_releases, late.num_releases) == (1, 1)
