"""What must hold after every run, whatever has happened in it."""

from __future__ import annotations

from vitrine_vlm.errors import InternalError
from vitrine_vlm.simulation.simulation import Run

# Errors with which a request may be refused: there was no encoder, no room or no time for it.
_REFUSALS = {"encoder_unavailable", "overloaded", "deadline_exceeded", "prompt_too_long"}
# What a broken version of the encoder answers.
_FAULT_OF_ENCODER = InternalError.code
# Beyond what admission promises: the batch that runs, and one that is built.
_SLACK_S = 2.0
# By how much less the caches may hit than the places of the items allow.
_CACHE_PART = 0.02


def violations(run: Run) -> list[str]:
    """What does not hold, in words; nothing where all is well."""
    found = [*_answers(run), *run.fleet.left_behind()]
    if not run.scenario.faults:
        found += [*_starved(run), *_cache(run)]
    return found


def _answers(run: Run) -> list[str]:
    found: list[str] = []
    is_broken = any(fault.kind == "bad_deploy" for fault in run.scenario.faults)
    allowed = _REFUSALS | {_FAULT_OF_ENCODER} if is_broken else _REFUSALS
    if len(run.outcomes) != len(run.requests):
        found.append(f"{len(run.requests)} requests have {len(run.outcomes)} outcomes")
    for outcome in run.outcomes:
        if outcome.num_answers != 1:
            found.append(f"{outcome.request} was answered {outcome.num_answers} times")
        elif outcome.error is not None and outcome.error not in allowed:
            found.append(f"{outcome.request} failed with {outcome.error}")
        elif outcome.error is None and outcome.num_tokens != outcome.request.num_generated:
            found.append(f"{outcome.request} got {outcome.num_tokens} tokens")
    return found


def _starved(run: Run) -> list[str]:
    limit_s = run.scenario.encoder_limits.max_queued_s + _SLACK_S
    return [
        f"an item waited {encoder.longest_queue_s:.1f} s at {encoder.address}, and {limit_s:g} s is the most"
        for encoder in run.fleet.all_encoders
        if encoder.longest_queue_s > limit_s
    ]


def _cache(run: Run) -> list[str]:
    """Where nothing was evicted or refused, each encoder computes each content that came to it once."""
    if any(outcome.error is not None for outcome in run.outcomes):
        return []
    stats = [(encoder.cache.stats(), len(encoder.contents)) for encoder in run.fleet.all_encoders]
    if any(each.evictions for each, _ in stats) or not run.scenario.encoder_limits.cache_nbytes:
        return []
    num_items = sum(each.hits + each.joined + each.misses for each, _ in stats)
    num_misses, num_contents = sum(each.misses for each, _ in stats), sum(number for _, number in stats)
    if num_misses > num_contents + _CACHE_PART * num_items:
        return [f"{num_misses} of {num_items} items were computed, and {num_contents} are different"]
    return []
