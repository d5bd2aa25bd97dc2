"""What users saw during each event, as a table, and what must hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.cluster.load import Outcome
from tests.cluster.pods import End
from tests.cluster.story import Event


def table(events: Sequence[Event], outcomes: Sequence[Outcome]) -> str:
    """Returns a line an event, of the requests that overlap with it, as Markdown. Times are milliseconds."""
    lines = [
        "| event | took | requests | failed | sent again | p50 | p99 | longest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for event in events:
        during = [each for each in outcomes if each.at < event.end and each.at + each.seconds > event.begin]
        if not during:
            lines.append(f"| {event.name} | {event.end - event.begin:.0f} s | 0 | | | | | |")
            continue
        times = np.array([each.seconds for each in during]) * 1e3
        failed = sum(each.error is not None for each in during)
        again = sum(bool(each.tries) for each in during)
        p50, p99 = np.percentile(times, [50, 99])
        lines.append(
            f"| {event.name} | {event.end - event.begin:.0f} s | {len(during)} | {failed} | {again} "
            f"| {p50:.0f} | {p99:.0f} | {times.max():.0f} |"
        )
    return "\n".join(lines)


def faults(outcomes: Sequence[Outcome], ends: Sequence[End]) -> list[str]:
    """Returns what should not have been: failed requests, other answers, pods that served and did not end well."""
    return [
        *(f"failed: {each.error}, before it {each.tries}" for each in outcomes if each.error is not None),
        *("an answer is another one than before" for each in outcomes if each.is_wrong),
        *(
            f"{end.container} ended with {end.status} after SIGTERM"
            for end in ends
            if end.served and end.asked and end.status
        ),
    ]
