"""What must hold in a soak, and whether it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.soak.disturbances import Disturbance
from benchmarks.soak.load import Outcome
from benchmarks.soak.samples import Sample

_MAX_FAILURES_SHOWN = 5
# Batches of other requests change the last bits of logits, and so, where two tokens are nearly equal, an answer.
_MAX_DIFFERING = 0.02
# Of the memory, while the load runs; and where that is more, of what memory scatters around a straight line.
_MAX_GROWTH, _NUM_DEVIATIONS = 0.05, 3.0
_WARM_UP_PART = 1 / 3
# Connections that are kept open for a while.
_MAX_MORE_FILES, _MAX_MORE_THREADS = 8, 4


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `found` says in words what was seen."""

    name: str
    found: str
    passed: bool


def checks(
    outcomes: Sequence[Outcome],
    disturbances: Sequence[Disturbance],
    samples: Sequence[Sample],
    before: Mapping[str, Sample],
    after: Mapping[str, Sample],
    busy: Mapping[str, float],
) -> list[Check]:
    """
    Args:
        samples: of services that ran all the time, under load. before, after: the same services without load.
        busy: gauges that are not 0 at the end.
    """
    failures = [each.error for each in outcomes if each.error is not None]
    common = "; ".join(f"{count} x {text}" for text, count in Counter(failures).most_common(_MAX_FAILURES_SHOWN))
    answered = [each for each in outcomes if each.error is None and not each.abandoned]
    differing = sum(each.differs for each in answered)
    kinds = Counter(each.what for each in disturbances)
    found = [
        Check(
            "requests that failed", f"{len(failures)} of {len(outcomes)}{': ' + common if common else ''}", not failures
        ),
        Check(
            "answers unlike those in the quiet",
            f"{differing} of {len(answered)}",
            bool(answered) and differing <= _MAX_DIFFERING * len(answered),
        ),
        Check(
            "disturbances",
            f"{kinds['killed']} encoders killed, {kinds['restarted']} workers restarted",
            kinds["killed"] > 0 and kinds["restarted"] > 0,
        ),
        Check("leases, pools, KV blocks, requests at the end", str(dict(busy) or "none"), not busy),
    ]
    for name in before:
        found.append(_memory(name, [each for each in samples if each.service == name]))
        files, threads = (
            (after[name].num_files, before[name].num_files),
            (
                after[name].num_threads,
                before[name].num_threads,
            ),
        )
        found.append(
            Check(f"files of {name}", f"{files[1]} before, {files[0]} after", files[0] <= files[1] + _MAX_MORE_FILES)
        )
        found.append(
            Check(
                f"threads of {name}",
                f"{threads[1]} before, {threads[0]} after",
                threads[0] <= threads[1] + _MAX_MORE_THREADS,
            )
        )
    return found


def _memory(name: str, samples: Sequence[Sample]) -> Check:
    """Whether memory grows, by a straight line through the samples behind the warm-up."""
    steady = samples[int(len(samples) * _WARM_UP_PART) :]
    at, mib = (np.array([each.at for each in steady]), np.array([each.rss_nbytes / 2**20 for each in steady]))
    slope, base = np.polyfit(at - at[0], mib, 1)
    deviation = float(np.std(mib - (slope * (at - at[0]) + base)))
    growth = float(slope * (at[-1] - at[0]))
    text = f"{base:.0f} MiB, {slope * 60:+.2f} MiB a minute, scattered by {deviation:.1f} MiB"
    return Check(f"memory of {name}", text, growth <= max(_MAX_GROWTH * float(base), _NUM_DEVIATIONS * deviation))
