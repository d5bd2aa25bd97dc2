"""The autotuner: it measures and logs which implementation of some work is the fastest at each size."""

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
# An implementation is chosen over the default if it takes at most this share of its time: less of a gain is noise.
_MAX_TIME_RATIO = 0.98
# Every size up to the first is measured, as it decides how full the last wave of tiles is. All sizes above it are
# measured as one, at most as large as the second.
_ALL_UP_TO, _LARGEST = 8192, 16384


class Tuned(Generic[Implementation]):
    """The implementation to use at each size: that of the next larger size that was measured, or of the largest one."""

    def __init__(self, sizes: Sequence[int], implementations: Sequence[Implementation]) -> None:
        """
        Args:
            sizes: ascending, each with its implementation; a single implementation needs none.
        """
        self._sizes, self._implementations = sizes, implementations

    def at(self, size: int) -> Implementation:
        """The implementation for a size."""
        return self._implementations[min(bisect_left(self._sizes, size), len(self._implementations) - 1)]


def autotune(
    what: str,
    implementations: dict[str, Implementation],
    work: Callable[[int], Callable[[Implementation], object]],
    sizes: Sequence[int],
) -> Tuned[Implementation]:
    """Measures the implementations at each size.

    Args:
        what: the work, for the log.
        implementations: by name; the first is the default, which others must beat.
        work: makes, for a size, a function that runs a given implementation on the current device.
        sizes: ascending, at least one.
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
        chosen.append(fastest if ms[fastest] <= _MAX_TIME_RATIO * ms[default] else default)
    counts = ", ".join(f"{count} by {name}" for name, count in Counter(chosen).most_common())
    last = ", ".join(f"{name} {time:.3f} ms" for name, time in ms.items())
    _log.info("%s: of %d sizes %s; the largest by %s", what, len(measured), counts, last)
    return Tuned(measured, [implementations[name] for name in chosen])
