"""A soak fails where one thing that must hold does not. `make soak` runs a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.soak.disturbances import Disturbance
from benchmarks.soak.load import Outcome
from benchmarks.soak.samples import Sample
from benchmarks.soak.verdict import checks

MIB = 2**20
OUTCOMES = [Outcome(float(at), 0.5) for at in range(200)]
DISTURBANCES = [Disturbance(1.0, "encoder-1", "killed", 4.0), Disturbance(2.0, "worker-1", "restarted", 5.0)]
# Memory that scatters by a few MiB, and stays.
STEADY = [Sample(2.0 * step, "worker-0", 1, (500 + step * 7 % 5) * MIB, 14, 25) for step in range(90)]
BEFORE = {"worker-0": STEADY[0]}


def failed(
    outcomes: Sequence[Outcome] = OUTCOMES,
    disturbances: Sequence[Disturbance] = DISTURBANCES,
    samples: Sequence[Sample] = STEADY,
    after: Sample = STEADY[-1],
    busy: dict[str, float] | None = None,
) -> list[str]:
    found = checks(outcomes, disturbances, samples, BEFORE, {"worker-0": after}, busy or {})
    return [each.name for each in found if not each.passed]


def test_a_good_run_passes() -> None:
    assert failed() == []
    assert failed([*OUTCOMES, Outcome(7.0, 0.1, abandoned=True), Outcome(8.0, 0.1, differs=True)]) == []


@pytest.mark.parametrize(
    ("faults", "name"),
    [
        ({"outcomes": [*OUTCOMES, Outcome(7.0, 0.1, error="HTTP 503")]}, "requests that failed"),
        ({"outcomes": [replace(each, differs=each.at < 5) for each in OUTCOMES]}, "answers unlike those in the quiet"),
        ({"outcomes": []}, "answers unlike those in the quiet"),
        ({"disturbances": DISTURBANCES[:1]}, "disturbances"),
        ({"disturbances": DISTURBANCES[1:]}, "disturbances"),
        ({"busy": {"encoder-0 vitrine_encoder_leases_live": 1.0}}, "leases, pools, KV blocks, requests at the end"),
        (
            {"samples": [replace(each, rss_nbytes=each.rss_nbytes + int(each.at) * MIB // 4) for each in STEADY]},
            "memory of worker-0",
        ),
        ({"after": replace(STEADY[-1], num_files=60)}, "files of worker-0"),
        ({"after": replace(STEADY[-1], num_threads=30)}, "threads of worker-0"),
    ],
)
def test_each_fault_fails_it(faults: dict[str, object], name: str) -> None:
    assert failed(**faults) == [name]  # type: ignore[arg-type]
