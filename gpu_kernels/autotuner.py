"""The autotuner: of several implementations of the same work, the fastest at each size, as measured and logged."""

from __future__ import annotations

import functools
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from vitrine_vlm.gpu_kernels.timing import graphed_median_ms

_log = logging.getLogger(__name__)
Implementation = TypeVar("Implementation")

_REPEATS = 9
# Less is noise.
_WORTH_IT = 0.98
# Up to the first each size is measured, as it decides how full the last round of tiles is. The second stands for more.
_ALL_UP_TO, _LARGEST = 8192, 16384


class Tuned(Generic[Implementation]):
    """Between two sizes that were measured, the choice of the larger one; above all, that of the largest."""

    def __init__(self, sizes: Sequence[int], implementations: Sequence[Implementation]) -> None:
        """
        Args:
            sizes: ascending, each with its implementation; a single implementation needs none.
        """
        self._sizes, self._implementations = sizes, implementations

    def at(self, size: int) -> Implementation:
        return self._implementations[min(bisect_left(self._sizes, size), len(self._implementations) - 1)]


def autotune(
    what: str,
    implementations: dict[str, Implementation],
    work: Callable[[int], Callable[[Implementation], object]],
    sizes: Sequence[int],
) -> Tuned[Implementation]:
    """
    Args:
        what: the work, for the log.
        implementations: by name; the first is the default, which others must beat.
        work: for a size, what runs a given implementation on the current device.
        sizes: ascending, one at least.
    """
    default = next(iter(implementations))
    measured = [size for size in sizes if size <= _ALL_UP_TO]
    if sizes[-1] > _ALL_UP_TO:
        measured.append(min(sizes[-1], _LARGEST))
    chosen: list[str] = []
    for size in measured:
        run = work(size)
        ms = {name: graphed_median_ms(functools.partial(run, each), _REPEATS) for name, each in implementations.items()}
        fastest = min(ms, key=ms.__getitem__)
        chosen.append(fastest if ms[fastest] <= _WORTH_IT * ms[default] else default)
    counts = ", ".join(f"{count} by {name}" for name, count in Counter(chosen).most_common())
    last = ", ".join(f"{name} {time:.3f} ms" for name, time in ms.items())
    _log.info("%s: of %d sizes %s; the largest by %s", what, len(measured), counts, last)
    return Tuned(measured, [implementations[name] for name in chosen])
