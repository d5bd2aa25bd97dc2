"""The figures of a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vitrine_vlm.simulation.simulation import Run


@dataclass(frozen=True)
class Report:
    """
    goodput: requests a second that were answered within the goals for TTFT, of the time in which requests came.
    ttft_s, encode_s: until a first token, and until all embeddings of a request are there: 50, 90 and 99 %.
    computed_part: of all items, what no cache had; distinct_part: what it would be with one cache for all.
    load_spread: the busiest tower's seconds by the mean's. refused: errors by their code.
    num_moved: items that were taken to another encoder because theirs was slow.
    """

    num_requests: int
    goodput: float
    ttft_s: tuple[float, float, float]
    encode_s: tuple[float, float, float]
    computed_part: float
    distinct_part: float
    load_spread: float
    tower_utilization: float
    num_retries: int
    num_moved: int
    refused: dict[str, int]
    virtual_s: float
    cpu_s: float
    callbacks_a_second: float

    def lines(self) -> list[str]:
        """A line a figure."""
        return [f"{name:20} {_shown(value)}" for name, value in asdict(self).items()]


def report(run: Run) -> Report:
    done = [each for each in run.outcomes if each.error is None]
    ttft_s = sorted(each.first_token_at - each.request.at for each in done if each.first_token_at is not None)
    encode_s = sorted(each.embeddings_at - each.request.at for each in done if each.embeddings_at is not None)
    goal_s = run.scenario.worker_limits.target_ttft_s
    seconds = max((each.request.at for each in run.outcomes), default=0.0) or 1.0
    stats = [encoder.cache.stats() for encoder in run.fleet.all_encoders]
    num_items = sum(each.hits + each.joined + each.misses for each in stats) or 1
    contents: set[bytes] = set().union(*(encoder.contents for encoder in run.fleet.all_encoders))
    busy: Counter[str] = Counter()
    for encoder in run.fleet.all_encoders:
        busy[encoder.address] += 0
        busy.update({encoder.address: encoder.tower.busy_s})
    mean_s = busy.total() / len(busy) or 1.0
    clients = [worker.client.stats() for worker in run.fleet.workers]
    return Report(
        num_requests=len(run.outcomes),
        goodput=sum(each <= goal_s for each in ttft_s) / seconds,
        ttft_s=_percentiles(ttft_s),
        encode_s=_percentiles(encode_s),
        computed_part=sum(each.misses for each in stats) / num_items,
        distinct_part=len(contents) / num_items,
        load_spread=max(busy.values()) / mean_s,
        tower_utilization=mean_s / run.virtual_s if run.virtual_s else 0.0,
        num_retries=sum(each.retries for each in clients),
        num_moved=sum(each.moved for each in clients),
        refused=dict(Counter(each.error for each in run.outcomes if each.error is not None)),
        virtual_s=run.virtual_s,
        cpu_s=run.cpu_s,
        callbacks_a_second=run.num_callbacks / max(run.cpu_s, 1e-9),
    )


def digest(run: Run) -> str:
    """A hash of when each request got what: two runs of one seed have equal ones."""
    moments = [(each.error, each.embeddings_at, each.first_token_at, each.ended_at) for each in run.outcomes]
    return hashlib.sha256(repr(moments).encode()).hexdigest()[:16]


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Of sorted values; zeros where there are none."""
    if not values:
        return 0.0, 0.0, 0.0
    last = len(values) - 1
    return values[last // 2], values[last * 9 // 10], values[last * 99 // 100]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return " / ".join(_shown(each) for each in value)
    return str(value)
