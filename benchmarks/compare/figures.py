"""Figures of a load from its record, and how those of two servers compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Figure:
    """A figure. digits: decimal places that are shown."""

    key: str
    title: str
    digits: int
    higher_is_better: bool = False

    @property
    def plain_title(self) -> str:
        """The title without its unit, for ratios."""
        return self.title.removesuffix(", ms").removesuffix(", requests/s")


FIGURES = (
    Figure("requests_per_s", "requests/s", 2, higher_is_better=True),
    Figure("goodput_per_s", "goodput, requests/s", 2, higher_is_better=True),
    Figure("ttft_p50_ms", "TTFT p50, ms", 0),
    Figure("ttft_p99_ms", "TTFT p99, ms", 0),
    Figure("itl_p50_ms", "ITL p50, ms", 1),
    Figure("itl_p99_ms", "ITL p99, ms", 1),
    Figure("token_p50_ms", "mean a token, p50 of streams, ms", 2),
    Figure("token_max_ms", "mean a token, worst stream, ms", 2),
    Figure("gap_p50_ms", "largest gap, p50 of streams, ms", 0),
    Figure("gap_max_ms", "largest gap, worst stream, ms", 0),
    Figure("pictures_per_s", "pictures/s beside", 1, higher_is_better=True),
    Figure("cpu_s_per_request", "CPU s a request", 3),
    Figure("energy_j_per_request", "J a request", 1),
)


@dataclass(frozen=True)
class Goals:
    """What an answer must reach to count as goodput: its TTFT, and the mean time of its tokens, milliseconds."""

    ttft_ms: float = 500.0
    itl_ms: float = 50.0


def figures_of(record: Mapping[str, Any], goals: Goals) -> dict[str, float]:
    """Returns the figures of a load by their keys; those that it does not have are left out.

    Times of a stream are from one piece of its answer to the next. Its mean a token is their sum by its tokens but the
    first, so that pieces of several tokens count as several.
    """
    answers: Sequence[Mapping[str, Any]] = record["answers"]
    figures: dict[str, float] = {}
    if not answers:
        return figures
    ttfts = [each["ttft_ms"] for each in answers]
    streams = [each for each in answers if each["itl_ms"] and each["num_tokens"] > 1]
    means = [_mean_ms(each) for each in streams]
    met = sum(each["ttft_ms"] <= goals.ttft_ms and _mean_ms(each) <= goals.itl_ms for each in answers)
    figures |= {
        "requests_per_s": len(answers) / record["seconds"],
        "goodput_per_s": met / record["seconds"],
        "ttft_p50_ms": _percentile(ttfts, 50),
        "ttft_p99_ms": _percentile(ttfts, 99),
    }
    if streams:
        gaps = [gap for each in streams for gap in each["itl_ms"]]
        largest = [max(each["itl_ms"]) for each in streams]
        figures |= {
            "itl_p50_ms": _percentile(gaps, 50),
            "itl_p99_ms": _percentile(gaps, 99),
            "token_p50_ms": _percentile(means, 50),
            "token_max_ms": max(means),
            "gap_p50_ms": _percentile(largest, 50),
            "gap_max_ms": max(largest),
        }
    if record.get("pictures_per_s") is not None:
        figures["pictures_per_s"] = record["pictures_per_s"]
    for key, counter in (("cpu_s_per_request", "cpu_s"), ("energy_j_per_request", "energy_j")):
        if record.get(counter) is not None:
            figures[key] = record[counter] / len(answers)
    return figures


def ratio(figure: Figure, ours: float, theirs: float) -> float | None:
    """Returns how many times better ours is: above 1 is better, below 1 worse. None where both are 0."""
    better, worse = (ours, theirs) if figure.higher_is_better else (theirs, ours)
    if worse == 0:
        return float("inf") if better else None
    return better / worse


def _mean_ms(answer: Mapping[str, Any]) -> float:
    total_ms: float = sum(answer["itl_ms"])
    num_gaps: int = max(1, answer["num_tokens"] - 1)
    return total_ms / num_gaps


def _percentile(values: Sequence[float], percentile: float) -> float:
    return float(np.percentile(values, percentile))
