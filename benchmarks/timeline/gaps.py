"""Who waits for whom: the times of spans of one process, and the gaps between them by their cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from benchmarks.timeline.span import Kind, Span

Cause: TypeAlias = Literal["launched late", "launched late, or nothing to compute", "launched, not begun"]

# What ends this soon after its last launch had nothing else left to do.
_AT_ONCE_S = 0.5e-3


@dataclass(frozen=True)
class Gap:
    """A part of the time between two spans of a process, seconds of the monotonic clock.

    cause: "launched late" where the next step decodes, so that there was something to compute; "launched, not begun"
        where the device had not begun with the next one: another process has it, launching takes that long, or it
        computes what spans do not have, such as a step's logits and sampling.
    """

    begin_s: float
    end_s: float
    cause: Cause


@dataclass(frozen=True)
class KindFigures:
    """The spans of one kind.

    num_tokens, launch_ms: means. shared: number of those that overlap with a span of another process; shared_ms,
        alone_ms: means of these and of the others, 0 where there are none.
    host_bound: number of those that ended as soon as they were launched: the device waited for the host in them.
    """

    kind: Kind
    count: int
    num_tokens: float
    alone_ms: float
    shared_ms: float
    shared: int
    launch_ms: float
    host_bound: int


def gaps_between(spans: Sequence[Span]) -> list[Gap]:
    """The gaps between the spans of one process, which are in order, in parts of one cause each."""
    gaps = []
    for before, after in pairwise(spans):
        launched_s = min(max(after.launched_s, before.end_s), after.begin_s)
        late: Cause = "launched late" if after.decodes else "launched late, or nothing to compute"
        parts: tuple[tuple[float, float, Cause], ...] = (
            (before.end_s, launched_s, late),
            (launched_s, after.begin_s, "launched, not begun"),
        )
        gaps += [Gap(*part) for part in parts if part[1] > part[0]]
    return gaps


def busy_s(spans: Iterable[Span | Gap]) -> float:
    """Seconds of spans or gaps of one process, which do not overlap."""
    return sum(span.end_s - span.begin_s for span in spans)


def overlap_s(ours: Iterable[Span | Gap], theirs: Sequence[Span]) -> float:
    """Seconds of `ours` in which one of `theirs` is on the device, too. Both are in order."""
    total, first = 0.0, 0
    for one in ours:
        while first < len(theirs) and theirs[first].end_s <= one.begin_s:
            first += 1
        for other in theirs[first:]:
            if other.begin_s >= one.end_s:
                break
            total += min(one.end_s, other.end_s) - max(one.begin_s, other.begin_s)
    return total


def on_the_same_device(name: str, spans: Mapping[str, Sequence[Span]]) -> list[Span]:
    """The spans of the other processes on the device of this one, in order."""
    devices = {span.device for span in spans[name]}
    others = (span for other, each in spans.items() if other != name for span in each if span.device in devices)
    return sorted(others, key=lambda span: span.begin_s)


def kinds_of(spans: Sequence[Span], others: Sequence[Span]) -> list[KindFigures]:
    """Figures by kind, of those that a process had."""
    figures = []
    for kind in ("batch", "decode", "mixed", "prompts"):
        of_kind = [span for span in spans if span.kind == kind]
        if not of_kind:
            continue
        shared: list[Span] = []
        alone: list[Span] = []
        for span in of_kind:
            (shared if overlap_s([span], others) > 0 else alone).append(span)
        num_tokens = sum(span.num_tokens for span in of_kind) / len(of_kind)
        launch_ms = 1e3 * sum(span.returned_s - span.launched_s for span in of_kind) / len(of_kind)
        means = _mean_ms(alone), _mean_ms(shared)
        host_bound = sum(span.end_s - span.returned_s < _AT_ONCE_S for span in of_kind)
        figures.append(KindFigures(kind, len(of_kind), num_tokens, *means, len(shared), launch_ms, host_bound))
    return figures


def _mean_ms(spans: Sequence[Span]) -> float:
    return 1e3 * busy_s(spans) / len(spans) if spans else 0.0
