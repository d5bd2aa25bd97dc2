"""How many random scenarios are run, and from which seed on."""

from __future__ import annotations

import os

import pytest

_DEFAULT_NUM = 200


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Groups of ten seeds, so that a failure names a few."""
    if "scenario_seeds" in metafunc.fixturenames:
        first = int(os.environ.get("VITRINE_SIMULATION_SEED", "0"))
        stop = first + int(os.environ.get("VITRINE_SIMULATION_RUNS", _DEFAULT_NUM))
        groups = [range(begin, min(begin + 10, stop)) for begin in range(first, stop, 10)]
        metafunc.parametrize("scenario_seeds", groups, ids=[f"{each.start}-{each.stop - 1}" for each in groups])
