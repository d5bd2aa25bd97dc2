"""Tables of figures, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A figure. `bar` is the value that it is compared with, or empty."""

    figure: str
    measured: str
    bar: str = ""


def table(rows: Iterable[Row]) -> str:
    lines = [f"| {row.figure} | {row.bar} | {row.measured} |" for row in rows]
    return "\n".join(["| figure | bar | measured |", "|---|---|---|", *lines])
