"""The figures of all servers at all loads, and how many times better one is than another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.figures import FIGURES, Figure, Goals, figures_of, ratio
from benchmarks.compare.records import Results


@dataclass(frozen=True)
class Loss:
    """A figure in which `other` is better than ours."""

    load: str
    figure: Figure
    other: str
    ours: float
    theirs: float
    ratio: float


class Comparison:
    """What is shown of results.

    Args:
        ours: the server whose losses are listed; by default the first that was measured.
        baseline: the server that ratios are against; by default the first other one.

    Raises:
        ValueError: nothing was measured, or not on these servers.
    """

    def __init__(self, results: Results, ours: str | None, baseline: str | None, goals: Goals) -> None:
        self.results = results
        self.goals = goals
        self.servers = results.servers
        self.load_names = results.load_names
        for name in (ours, baseline):
            if name is not None and name not in self.servers:
                raise ValueError(f"nothing was measured on {name}, only on {', '.join(self.servers)}")
        if not self.servers:
            raise ValueError("nothing was measured, so that there is no page to write")
        self.ours = ours or self.servers[0]
        self.others = [each for each in self.servers if each != self.ours]
        self.baseline = baseline or (self.others[0] if self.others else self.ours)
        self._figures = {key: figures_of(record, goals) for key, record in results.loads.items()}

    def figures(self, keys: Sequence[str] | None = None) -> list[Figure]:
        """Returns the figures that any load has, in order; only those of `keys`, if given."""
        there = {key for figures in self._figures.values() for key in figures}
        return [each for each in FIGURES if each.key in there and (keys is None or each.key in keys)]

    def value(self, server: str, load: str, figure: Figure) -> float | None:
        return self._figures.get((server, load), {}).get(figure.key)

    def ratio(self, figure: Figure, load: str, server: str, other: str) -> float | None:
        """Returns how many times better `server` is than `other`; None where one of them was not measured."""
        ours, theirs = self.value(server, load, figure), self.value(other, load, figure)
        return None if ours is None or theirs is None else ratio(figure, ours, theirs)

    def mean_ratio(self, figure: Figure, server: str, other: str) -> tuple[float, int, int] | None:
        """Returns the geometric mean of a figure's ratios over loads, the number of ratios above 1, and of all."""
        ratios = [self.ratio(figure, load, server, other) for load in self.load_names]
        known = [each for each in ratios if each is not None]
        logs = [math.log(each) for each in known if 0 < each < math.inf]
        if not logs:
            return None
        return math.exp(sum(logs) / len(logs)), sum(each > 1 for each in known), len(known)

    def losses(self) -> list[Loss]:
        """Returns every figure in which another server is better than ours, the worst first."""
        losses = []
        for load in self.load_names:
            for figure in self.figures():
                for other in self.others:
                    worse = self.ratio(figure, load, self.ours, other)
                    ours, theirs = self.value(self.ours, load, figure), self.value(other, load, figure)
                    if worse is not None and worse < 1 and ours is not None and theirs is not None:
                        losses.append(Loss(load, figure, other, ours, theirs, worse))
        return sorted(losses, key=lambda loss: loss.ratio)

    def workloads(self) -> list[dict[str, Any]]:
        """Returns what each load was, by the last record of it."""
        return list({load: record["workload"] for (_, load), record in self.results.loads.items()}.values())
