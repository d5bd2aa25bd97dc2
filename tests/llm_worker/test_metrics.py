"""The metrics of requests, the engine and the encoders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from vitrine_vlm.embedding_transport.clients.fleet_client import ClientStats
from vitrine_vlm.errors import NotAnImage
from vitrine_vlm.llm_worker.engine.engine import EngineStats
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, StageTimings, Started
from vitrine_vlm.llm_worker.metrics import LlmMetrics

FINISHED = Finished("stop", 10, 0, 3, StageTimings())


async def events(*given: GenerationEvent | Exception, gap_s: float = 0.0) -> AsyncGenerator[GenerationEvent]:
    for each in given:
        await asyncio.sleep(gap_s)
        if isinstance(each, Exception):
            raise each
        yield each


async def watched(metrics: LlmMetrics, given: AsyncGenerator[GenerationEvent]) -> AsyncGenerator[GenerationEvent]:
    """Reports events as a generator does."""
    with metrics.measure_request() as observe:
        async for event in given:
            observe(event)
            yield event


async def run(metrics: LlmMetrics, given: AsyncGenerator[GenerationEvent]) -> list[GenerationEvent]:
    return [event async for event in watched(metrics, given)]


def value(metrics: LlmMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vitrine_llm_{name}", labels)


async def test_events_are_counted() -> None:
    metrics = LlmMetrics()
    await run(metrics, events(Started(10, 4), Delta([1], "a"), Delta([2, 3], "b"), FINISHED))
    assert value(metrics, "requests_total", outcome="ok") == 1
    assert [value(metrics, "tokens_total", kind=kind) for kind in ("prompt", "media", "generated")] == [10, 4, 3]


async def test_time_to_the_first_token_and_between_tokens_are_apart() -> None:
    metrics = LlmMetrics()
    await run(metrics, events(Started(1, 0), Delta([1]), Delta([2]), Delta([3]), FINISHED, gap_s=0.03))
    assert (value(metrics, "ttft_seconds_count"), value(metrics, "itl_seconds_count")) == (1, 2)
    assert (value(metrics, "ttft_seconds_sum") or 0) >= 0.055  # two gaps: Started and the first token
    assert (value(metrics, "itl_seconds_sum") or 0) >= 0.055  # two gaps between three tokens


@pytest.mark.parametrize(
    ("error", "outcome"), [(NotAnImage("no image"), "not_an_image"), (ValueError("a bug"), "internal_error")]
)
async def test_a_failure_is_counted_by_its_code(error: Exception, outcome: str) -> None:
    metrics = LlmMetrics()
    with pytest.raises(type(error)):
        await run(metrics, events(Started(1, 0), error))
    assert value(metrics, "requests_total", outcome=outcome) == 1


async def test_leaving_is_cancelled_before_the_end_and_ok_after_it() -> None:
    metrics = LlmMetrics()
    for leave_at in (Delta, Finished):
        async with aclosing(watched(metrics, events(Started(1, 0), Delta([1]), FINISHED))) as seen:
            async for event in seen:
                if isinstance(event, leave_at):
                    break
    assert value(metrics, "requests_total", outcome="cancelled") == 1
    assert value(metrics, "requests_total", outcome="ok") == 1


def _engine_stats() -> EngineStats:
    return EngineStats(
        running=1,
        waiting=2,
        num_computing=1,
        max_num_seqs=6,
        queued_prefill_tokens=17,
        kv_blocks_used=3,
        kv_blocks_kept=13,
        kv_blocks_total=4,
        kv_blocks_evicted=14,
        num_steps=5,
        num_prefill_tokens=6,
        num_decode_tokens=7,
        num_cached_tokens=15,
        num_preempted=16,
        num_itl_missed=18,
        num_ttft_missed=19,
        step_cost_correction=1.5,
    )


@pytest.mark.parametrize(
    ("stats", "load"),
    [
        ({"running": 3, "num_computing": 3, "waiting": 0, "kv_blocks_used": 1}, 0.5),
        ({"running": 3, "num_computing": 0, "waiting": 0, "kv_blocks_used": 1}, 0.25),  # all wait for other services
        ({"running": 3, "num_computing": 3, "waiting": 0, "kv_blocks_used": 3}, 0.75),
        ({"running": 3, "num_computing": 3, "waiting": 6, "kv_blocks_used": 3}, 2.25),
        ({"running": 6, "num_computing": 6, "waiting": 12, "kv_blocks_used": 1}, 3.0),
        ({"running": 0, "num_computing": 0, "waiting": 0, "kv_blocks_used": 0}, 0.0),
        ({"running": 0, "num_computing": 0, "waiting": 0, "kv_blocks_used": 0, "kv_blocks_total": 0}, 0.0),
    ],
)
def test_load_is_by_what_is_short(stats: dict[str, int], load: float) -> None:
    assert replace(_engine_stats(), queued_prefill_tokens=100_000, **stats).load == pytest.approx(load)


def test_engine_and_encoders_are_read_at_each_scrape() -> None:
    engine_stats = _engine_stats()
    client_stats = ClientStats(requests=8, retries=9, fallbacks=10, received_nbytes={"shm": 11, "grpc": 12}, moved=13)
    metrics = LlmMetrics()
    metrics.watch_engine(lambda: engine_stats)
    metrics.watch_encoders(lambda: client_stats)
    assert value(metrics, "running") == engine_stats.running
    assert value(metrics, "waiting") == engine_stats.waiting
    assert value(metrics, "load") == engine_stats.load
    assert value(metrics, "queued_prefill_tokens") == engine_stats.queued_prefill_tokens
    assert value(metrics, "kv_blocks_used") == engine_stats.kv_blocks_used
    assert value(metrics, "kv_blocks") == engine_stats.kv_blocks_total
    assert value(metrics, "kv_blocks_kept") == engine_stats.kv_blocks_kept
    assert value(metrics, "kv_blocks_evicted_total") == engine_stats.kv_blocks_evicted
    assert value(metrics, "cached_tokens_total") == engine_stats.num_cached_tokens
    assert value(metrics, "preemptions_total") == engine_stats.num_preempted
    assert value(metrics, "step_goals_missed_total", goal="itl") == engine_stats.num_itl_missed
    assert value(metrics, "step_goals_missed_total", goal="ttft") == engine_stats.num_ttft_missed
    assert value(metrics, "step_cost_correction") == engine_stats.step_cost_correction
    assert value(metrics, "steps_total") == engine_stats.num_steps
    assert value(metrics, "computed_tokens_total", phase="prefill") == engine_stats.num_prefill_tokens
    assert value(metrics, "computed_tokens_total", phase="decode") == engine_stats.num_decode_tokens
    assert value(metrics, "encode_requests_total") == client_stats.requests
    assert value(metrics, "encode_retries_total") == client_stats.retries
    assert value(metrics, "encode_moved_items_total") == client_stats.moved
    assert value(metrics, "transport_fallbacks_total") == client_stats.fallbacks
    for transport, nbytes in client_stats.received_nbytes.items():
        assert value(metrics, "received_bytes_total", transport=transport) == nbytes
