"""Which of several ways to do the same is the fastest at which size: measured, and logged."""

from __future__ import annotations

import functools
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from gpu_kernels.timing import graphed_median_ms

_log = logging.getLogger(__name__)
Way = TypeVar("Way")

_REPEATS = 9
# Less is noise.
_WORTH_IT = 0.98
# Up to the first each size is measured, as it decides how full the last round of tiles is. The second stands for more.
_ALL_UP_TO, _LARGEST = 8192, 16384


class FastestWays(Generic[Way]):
    """Between two sizes that were measured, the way of the larger one; above all, that of the largest."""

    def __init__(self, sizes: Sequence[int], ways: Sequence[Way]) -> None:
        """
        Args:
            sizes: ascending, each with its way; a single way needs none.
        """
        self._sizes, self._ways = sizes, ways

    def at(self, size: int) -> Way:
        return self._ways[min(bisect_left(self._sizes, size), len(self._ways) - 1)]


def fastest_ways(
    what: str, ways: dict[str, Way], work: Callable[[int], Callable[[Way], object]], sizes: Sequence[int]
) -> FastestWays[Way]:
    """
    Args:
        what: is done, for the log.
        ways: by name; the first is the usual one, which others must beat.
        work: of a size, to be done in a given way on the current device.
        sizes: ascending, one at least.
    """
    usual = next(iter(ways))
    measured = [size for size in sizes if size <= _ALL_UP_TO]
    if sizes[-1] > _ALL_UP_TO:
        measured.append(min(sizes[-1], _LARGEST))
    chosen: list[str] = []
    for size in measured:
        done = work(size)
        ms = {name: graphed_median_ms(functools.partial(done, way), _REPEATS) for name, way in ways.items()}
        fastest = min(ms, key=ms.__getitem__)
        chosen.append(fastest if ms[fastest] <= _WORTH_IT * ms[usual] else usual)
    counts = ", ".join(f"{count} by {name}" for name, count in Counter(chosen).most_common())
    last = ", ".join(f"{name} {time:.3f} ms" for name, time in ms.items())
    _log.info("%s: of %d sizes %s; the largest by %s", what, len(measured), counts, last)
    return FastestWays(measured, [ways[name] for name in chosen])
