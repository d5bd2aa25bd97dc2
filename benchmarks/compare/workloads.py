"""The loads of a comparison: ten fixed ones, and a sweep over pictures, sizes, requests in flight and answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.pictures import show_size

Size = tuple[int, int]

TEXT_TOKENS = 128
SWEEP = "sweep: "  # how the names of its loads begin


@dataclass(frozen=True)
class Workload:
    """A load: `num_requests` requests, `in_flight` at a time, each with `num_pictures` pictures of `size` and text.

    repeated: share of the pictures that were sent before in the same load; all others are sent once.
    beside: 1080p pictures that are kept in flight meanwhile, one token of answer each.
    """

    name: str
    num_requests: int
    in_flight: int
    max_tokens: int
    size: Size = (560, 560)
    num_pictures: int = 1
    text_tokens: int = TEXT_TOKENS
    repeated: float = 0.0
    beside: int = 0


HD, FULL_HD, UHD = (1280, 720), (1920, 1080), (3840, 2160)
TEN = (
    Workload("560x560, 32 in flight, 1 token", 192, 32, 1),
    Workload("560x560, 32, 64 tokens", 128, 32, 64),
    Workload("720p, 32, 64 tokens", 96, 32, 64, HD),
    Workload("1080p, 8, 64 tokens", 48, 8, 64, FULL_HD),
    Workload("1080p, 32, 64 tokens", 64, 32, 64, FULL_HD),
    Workload("4 x 560x560, 16, 64 tokens", 48, 16, 64, num_pictures=4),
    Workload("560x560, one at a time", 12, 1, 1),
    Workload("1080p, one at a time", 12, 1, 1, FULL_HD),
    Workload("16 streams of 256 tokens beside 8 x 1080p", 16, 16, 256, num_pictures=0, beside=8),
    Workload("text only, 512 in, 128 out, 32", 96, 32, 128, num_pictures=0, text_tokens=512),
)
SGLANG_30398 = Workload(
    "4 x 1080p, 1024 in, 64 out, 16 (sglang#30398)", 48, 16, 64, FULL_HD, num_pictures=4, text_tokens=1024
)
SMALL = (Workload("small", 4, 2, 4, (96, 64)), Workload("small, text only", 4, 2, 4, num_pictures=0))

# The axes of the sweep.
NUM_PICTURES = (0, 1, 4)
SIZES: tuple[Size, ...] = ((280, 280), (560, 560), HD, FULL_HD, UHD)
IN_FLIGHT = (1, 4, 16, 64)
MAX_TOKENS = (1, 64, 512)
REPEATED = (0.0, 0.5)

# What a request takes on one H200 at Qwen3-VL-8B's dims (docs/performance.md), for estimates alone.
_S_PER_PIXEL = 0.032 / (1920 * 1080)
_S_PER_PROMPT_TOKEN = 24e-6
_S_PER_STEP = 6.5e-3
_PIXELS_PER_TOKEN = 32 * 32
_WANTED_S = 10.0
_MIN_ROUNDS, _MAX_ROUNDS = 2, 12
WARM_UP_TOKENS = 16


def sweep_workload(num_pictures: int, size: Size, in_flight: int, max_tokens: int, repeated: float) -> Workload:
    """Returns a load of the sweep: as many requests as take about ten seconds, but at least two for each in flight."""
    what = f"{num_pictures} x {show_size(size)}" if num_pictures else "text only"
    tokens = "1 token" if max_tokens == 1 else f"{max_tokens} tokens"
    name = f"{SWEEP}{what}, {in_flight}, {tokens}" + (f", {repeated:.0%} repeated" if repeated else "")
    one_round = Workload(name, in_flight, in_flight, max_tokens, size, num_pictures, repeated=repeated)
    rounds = math.floor(_WANTED_S / estimated_s(one_round))
    return replace(one_round, num_requests=in_flight * min(_MAX_ROUNDS, max(_MIN_ROUNDS, rounds)))


def warm_up(workload: Workload) -> Workload:
    """Returns the requests that are sent in front of a load: one for each in flight, with short answers."""
    tokens = min(workload.max_tokens, WARM_UP_TOKENS)
    return replace(workload, num_requests=min(workload.num_requests, workload.in_flight), max_tokens=tokens, repeated=0)


def estimated_s(workload: Workload) -> float:
    """Returns about how long a load takes on one H200 at Qwen3-VL-8B's dims."""
    pixels = workload.num_pictures * workload.size[0] * workload.size[1]
    prompt_s = pixels * _S_PER_PIXEL + (pixels / _PIXELS_PER_TOKEN + workload.text_tokens) * _S_PER_PROMPT_TOKEN
    rounds = math.ceil(workload.num_requests / workload.in_flight)
    return workload.num_requests * prompt_s + rounds * workload.max_tokens * _S_PER_STEP


def selected() -> tuple[Workload, ...]:
    """Returns the default selection: the ten, sglang#30398's, and of the sweep lines through common points."""
    small, large = (560, 560), FULL_HD
    points: list[tuple[int, Size, int, int, float]] = [
        *((1, size, 16, 64, 0.0) for size in SIZES),
        *((1, size, in_flight, 64, 0.0) for size in (small, large) for in_flight in IN_FLIGHT),
        *((1, size, 16, max_tokens, 0.0) for size in (small, large) for max_tokens in MAX_TOKENS),
        *((num_pictures, small, 16, 64, 0.0) for num_pictures in NUM_PICTURES),
        (4, large, 4, 64, 0.0),
        *((1, size, 16, 64, 0.5) for size in (small, large)),
        (4, small, 16, 64, 0.5),
    ]
    return _unique([*TEN, SGLANG_30398, *(sweep_workload(*point) for point in points)])


def quick() -> tuple[Workload, ...]:
    """Returns few loads of every kind."""
    few = (1, 3, 4, 5, 6, 8, 9)
    return (*(TEN[number] for number in few), sweep_workload(1, (560, 560), 16, 64, 0.5))


def full() -> tuple[Workload, ...]:
    """Returns the ten, sglang#30398's, and all of the sweep, with text only at one of the sizes."""
    points = itertools.product(NUM_PICTURES, SIZES, IN_FLIGHT, MAX_TOKENS, REPEATED)
    of_sweep = (sweep_workload(*point) for point in points if point[0] or (point[1] == (560, 560) and not point[4]))
    return _unique([*TEN, SGLANG_30398, *of_sweep])


def _unique(workloads: Iterable[Workload]) -> tuple[Workload, ...]:
    return tuple({each.name: each for each in workloads}.values())


def listing(workloads: Sequence[Workload]) -> str:
    """Returns a line for each load: its number, its name, its requests, its estimate."""
    return "\n".join(
        f"{number:3}  {each.name}: {each.num_requests} requests, about {estimated_s(each):.0f} s"
        for number, each in enumerate(workloads)
    )
