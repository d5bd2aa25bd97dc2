"""What must hold after every run, whatever has happened in it."""

from __future__ import annotations

from vitrine_vlm.errors import EncoderUnavailable, InternalError, Overloaded, PromptTooLong
from vitrine_vlm.simulation.encoder import SimulatedEncoder
from vitrine_vlm.simulation.simulation import Run
from vitrine_vlm.simulation.worker import Outcome

# Beyond what admission promises: the batch that runs, and one that is built.
_SLACK_S = 2.0
# By how much less the caches may hit than the places of the items allow.
_CACHE_PART = 0.02
# Moments are sums of floats.
_RESOLUTION_S = 1e-6


def violations(run: Run) -> list[str]:
    """What does not hold, in words; nothing where all is well."""
    return [*_answers(run), *run.fleet.left_behind(), *_starved(run), *_overtaken(run), *_load(run), *_cache(run)]


def _answers(run: Run) -> list[str]:
    """Every request has one answer: all its tokens, or an error for which there was a reason."""
    found: list[str] = []
    if len(run.outcomes) != len(run.requests):
        found.append(f"{len(run.requests)} requests have {len(run.outcomes)} outcomes")
    for outcome in run.outcomes:
        if outcome.num_answers != 1:
            found.append(f"{outcome.request} was answered {outcome.num_answers} times")
        elif outcome.error is not None and not _has_reason(run, outcome):
            found.append(f"{outcome.request} failed with {outcome.error}")
        elif outcome.error is None and outcome.num_tokens != outcome.request.num_generated:
            found.append(f"{outcome.request} got {outcome.num_tokens} tokens")
    return found


def _has_reason(run: Run, outcome: Outcome) -> bool:
    """Whether a request may have failed with its error; overload and length need no other reason."""
    faults = run.scenario.faults
    if outcome.error == EncoderUnavailable.code:  # they were lost, or have not answered in time
        took_s = (outcome.ended_at or 0.0) - outcome.request.at
        is_late = took_s >= run.scenario.worker_limits.encode_timeout_s - _RESOLUTION_S
        return bool(faults or run.fleet.ended) or is_late
    if outcome.error == InternalError.code:
        return any(fault.kind == "bad_deploy" for fault in faults)
    return outcome.error in (Overloaded.code, PromptTooLong.code)


def _longest_wait_s(run: Run, encoder: SimulatedEncoder) -> float:
    """How long an item may wait for its batch: as long as admission allows, with the tower as slow as it was."""
    return encoder.tower.slowest * (run.scenario.encoder_limits.max_queued_s + _SLACK_S)


def _starved(run: Run) -> list[str]:
    """No item waits longer for its batch than admission allows."""
    return [
        f"an item waited {encoder.longest_queue_s:.1f} s at {encoder.address}, and {limit_s:g} s is the most"
        for encoder in run.fleet.all_encoders
        if encoder.longest_queue_s > (limit_s := _longest_wait_s(run, encoder))
    ]


def _overtaken(run: Run) -> list[str]:
    """A worker gives no first token to a request that came after another one had all that it needs, before that one."""
    found: list[str] = []
    for number, worker in enumerate(run.fleet.workers):
        outcomes = [each for each in run.outcomes[number :: len(run.fleet.workers)] if each.error is None]
        by_ready = sorted(outcomes, key=_ready_at, reverse=True)
        last: Outcome | None = None  # of those that were ready, the one that had its first token last
        for outcome in outcomes:  # in the order of their arrival
            while by_ready and _ready_at(by_ready[-1]) <= outcome.request.at:
                ready = by_ready.pop()
                last = ready if last is None or _first_at(ready) > _first_at(last) else last
            if last is not None and _first_at(outcome) < _first_at(last):
                found.append(f"{worker.name} gave a first token to {outcome.request} before {last.request}")
    return found


def _ready_at(outcome: Outcome) -> float:
    return outcome.embeddings_at if outcome.embeddings_at is not None else float("inf")


def _first_at(outcome: Outcome) -> float:
    return outcome.first_token_at if outcome.first_token_at is not None else float("inf")


def _load(run: Run) -> list[str]:
    """No worker has more in flight on one encoder than the bound on the mean of all that routing states."""
    return [
        f"{worker.name} sent {worker.num_above_bound} items to encoders that were at their load bound"
        for worker in run.fleet.workers
        if worker.num_above_bound
    ]


def _cache(run: Run) -> list[str]:
    """Each encoder computes each content that came to it once, and once more for each time that it was evicted."""
    if not run.scenario.encoder_limits.cache_nbytes:
        return []
    encoders = run.fleet.all_encoders
    stats = [encoder.cache.stats() for encoder in encoders]
    num_items = sum(each.hits + each.joined + each.misses for each in stats)
    num_computed = sum(each.misses - each.unfinished for each in stats)
    num_needed = sum(len(encoder.contents) for encoder in encoders) + sum(each.evictions for each in stats)
    if num_computed > num_needed + _CACHE_PART * num_items:
        return [f"{num_computed} of {num_items} items were computed, and {num_needed} had to be"]
    return []
