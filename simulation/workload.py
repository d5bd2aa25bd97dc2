"""What users ask for: when, with which pictures, and for how many tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from vitrine_vlm.simulation.costs import MERGE_SIZE, PATCH_SIZE

_SIDE = PATCH_SIZE * MERGE_SIZE

# Requests a second at a moment.
Rate: TypeAlias = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture; equal keys are equal bytes. height, width: pixels."""

    key: str
    height: int
    width: int

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """As Qwen3-VL's processor cuts it: sides are rounded to whole tokens."""
        return _grid_thw(self.height, self.width)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid_thw) // MERGE_SIZE**2


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A user's request. at: seconds from the start; num_text, num_generated: tokens."""

    at: float
    num_text: int
    num_generated: int
    pictures: tuple[Picture, ...]


# Pixels (height, width) of pictures, and how often each size comes.
SIZES: dict[tuple[int, int], float] = {(280, 280): 2, (560, 560): 4, (720, 1280): 3, (1080, 1920): 1}


@cache
def _grid_thw(height: int, width: int) -> tuple[int, int, int]:
    rows, columns = (max(1, round(side / _SIDE)) * MERGE_SIZE for side in (height, width))
    return 1, rows, columns


def steady(rate: float) -> Rate:
    return lambda now: rate


def burst(rate: float, factor: float, begin: float, end: float) -> Rate:
    """`factor` times the rate from `begin` to `end`."""
    return lambda now: rate * factor if begin <= now < end else rate


def diurnal(rate: float, period_s: float) -> Rate:
    """A day of `period_s` seconds, from a fifth of the mean rate to nine fifths of it."""
    return lambda now: rate * (1 - 0.8 * math.cos(2 * math.pi * now / period_s))


def arrivals(rng: random.Random, rate: Rate, peak: float, seconds: float) -> Iterator[float]:
    """Moments of a Poisson process whose rate changes. peak: the rate's maximum.

    Source: Lewis and Shedler, Simulation of Nonhomogeneous Poisson Processes by Thinning, 1979.
    """
    now = 0.0
    while (now := now + rng.expovariate(peak)) < seconds:
        if rng.random() * peak < rate(now):
            yield now


class Pictures:
    """Draws pictures: new ones, some that were drawn before, and one that all send.

    repeated: part of the pictures that came before, one of the last `num_known`. viral: part that is the same picture.
    sizes: as SIZES.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        repeated: float = 0.0,
        viral: float = 0.0,
        num_known: int = 1000,
        sizes: Mapping[tuple[int, int], float] = SIZES,
    ) -> None:
        self._rng, self._repeated, self._viral, self._num_known = rng, repeated, viral, num_known
        self._known: list[Picture] = []
        self._num_drawn = 0
        self._sizes, self._weights = list(sizes), list(sizes.values())

    def draw(self) -> Picture:
        part = self._rng.random()
        if part < self._viral:
            return Picture("viral", 720, 1280)
        if self._known and part < self._viral + self._repeated:
            return self._rng.choice(self._known)
        self._num_drawn += 1
        (size,) = self._rng.choices(self._sizes, self._weights)
        picture = Picture(f"{self._num_drawn}", *size)
        if len(self._known) < self._num_known:
            self._known.append(picture)
        else:
            self._known[self._num_drawn % self._num_known] = picture
        return picture


def users(
    rng: random.Random, moments: Iterable[float], pictures: Pictures, num_pictures: Sequence[int], num_generated: int
) -> Iterator[SimulatedRequest]:
    """A request of its own at each moment. num_pictures: how many pictures it may have, one as likely as another."""
    for at in moments:
        drawn = tuple(pictures.draw() for _ in range(rng.choice(num_pictures)))
        yield SimulatedRequest(at, rng.randint(16, 256), rng.randint(1, 2 * num_generated - 1), drawn)


def agents(
    rng: random.Random,
    starts: Iterable[float],
    pictures: Pictures,
    *,
    num_turns: int,
    think_s: float,
    num_generated: int,
) -> list[SimulatedRequest]:
    """Agents that begin at these moments; each turn sends all pictures so far and one more."""
    requests: list[SimulatedRequest] = []
    for at in starts:
        seen: tuple[Picture, ...] = ()
        for turn in range(num_turns):
            seen = (*seen, pictures.draw())
            requests.append(SimulatedRequest(at, 64 * (turn + 1), num_generated, seen))
            at += rng.expovariate(1 / think_s)
    return sorted(requests, key=lambda request: request.at)


def read_trace(path: Path) -> list[SimulatedRequest]:
    """Reads a trace: a JSON object a line, in any order.

        {"at": 0.25, "num_text": 120, "num_generated": 64, "pictures": [{"key": "a", "height": 560, "width": 560}]}

    Raises:
        ValueError: a line is none, or has a number out of range.
    """
    requests: list[SimulatedRequest] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            pictures = tuple(
                Picture(str(each["key"]), int(each["height"]), int(each["width"])) for each in fields["pictures"]
            )
            request = SimulatedRequest(
                float(fields["at"]), int(fields["num_text"]), int(fields["num_generated"]), pictures
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} of {path} is no request: {error!r}") from error
        sides = [side for picture in pictures for side in (picture.height, picture.width)]
        numbers = [request.num_text, request.num_generated, *sides]
        if min(numbers) < 1 or not 0 <= request.at < math.inf:
            raise ValueError(f"line {number} of {path} has {request}: all numbers must be 1 or more, `at` 0 or more")
        requests.append(request)
    return sorted(requests, key=lambda request: request.at)
