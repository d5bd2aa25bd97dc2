"""A case: a fleet, its traffic and what happens to it, and the goals that must hold after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vitrine_vlm.simulation.checks import violations
from vitrine_vlm.simulation.fleet import Fleet
from vitrine_vlm.simulation.report import Report, report
from vitrine_vlm.simulation.scenario import Scenario
from vitrine_vlm.simulation.simulation import Run, simulate
from vitrine_vlm.simulation.workload import SimulatedRequest


@dataclass(frozen=True)
class Result:
    """What came of a case.

    undisturbed: the figures of the same fleet and rate with nothing happening. in_time: part of the requests that had
    a first token within the goal. violations: see `checks`.
    """

    run: Run
    figures: Report
    undisturbed: Report
    violations: list[str]

    @property
    def in_time(self) -> float:
        goal_s = self.run.scenario.worker_limits.target_ttft_s
        return sum(each <= goal_s for each in self.ttft_s(0.0)) / len(self.run.outcomes)

    @property
    def load_spread(self) -> float:
        """The busiest tower's seconds by the mean's, of the encoders that serve at the end."""
        busy_s = [encoder.tower.busy_s for encoder in self.run.fleet.encoders.values()]
        return max(busy_s) * len(busy_s) / sum(busy_s) if busy_s else 0.0

    @property
    def retried_part(self) -> float:
        """Retries for each request."""
        return self.figures.num_retries / len(self.run.outcomes)

    def ttft_s(self, begin: float, end: float = float("inf")) -> list[float]:
        """TTFT of the requests that came in this time and were answered, seconds."""
        return [
            each.first_token_at - each.request.at
            for each in self.run.outcomes
            if each.first_token_at is not None and each.error is None and begin <= each.request.at < end
        ]


@dataclass(frozen=True)
class Goal:
    """What must hold. text: in the page's words."""

    text: str
    holds: Callable[[Result], bool]


def _nothing_is_violated(result: Result) -> bool:
    return not result.violations


NOTHING_LOST = Goal("every request has one answer, and nothing is left", _nothing_is_violated)
NONE_REFUSED = Goal("no request is refused", lambda result: not result.figures.refused)


def in_time(part: float) -> Goal:
    return Goal(
        f"{100 * part:g} % of requests have a first token within the goal, 0.5 s",
        lambda result: result.in_time >= part,
    )


@dataclass(frozen=True)
class Case:
    """
    key: its name on the command line. what: in the page's words. begin: plans what happens. since, until: when it
    happens, seconds, for the plot.
    """

    key: str
    what: str
    scenario: Scenario
    requests: Sequence[SimulatedRequest]
    goals: tuple[Goal, ...]
    begin: Callable[[Fleet], None] = field(default=lambda fleet: None)
    since: float | None = None
    until: float | None = None


def run_case(case: Case, seed: int, undisturbed: Report | None = None) -> Result:
    run = simulate(case.scenario, seed, case.requests, case.begin)
    figures = report(run)
    return Result(run, figures, undisturbed or figures, violations(run))


def failures(case: Case, result: Result) -> list[str]:
    """Goals that do not hold, in words; nothing where all do."""
    figures = result.figures
    shown = (
        f"in time {result.in_time:.3f}, TTFT p50 {figures.ttft_s[0]:.3f} p99 {figures.ttft_s[2]:.3f} s, "
        f"load spread {result.load_spread:.2f}, computed {figures.computed_part:.3f}, "
        f"retries {figures.num_retries}, moved {figures.num_moved}, refused {figures.refused}, {result.violations[:3]}"
    )
    return [f"{case.key}: not so that {goal.text}: {shown}" for goal in case.goals if not goal.holds(result)]
