"""What is asked for: a rate of requests of one kind, or those of a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitrine_vlm.simulation.workload import Picture, SimulatedRequest, arrivals, steady

# Of the pictures that came before, a repeated one is one of so many last ones.
_NUM_KNOWN = 1000


@dataclass(frozen=True)
class Workload:
    """Requests of one kind.

    num_pictures: of each request. sizes: (width, height) in pixels, one as likely as another. text_in, text_out:
    tokens. repeated: part of the pictures that came before.
    """

    requests_per_s: float
    num_pictures: int
    sizes: tuple[tuple[int, int], ...]
    text_in: int
    text_out: int
    repeated: float = 0.0

    def requests(self, seconds: float, seed: int) -> list[SimulatedRequest]:
        """Those of a Poisson process, in the order of their arrival."""
        rng = random.Random(f"{seed} workload")
        known: list[Picture] = []
        num_drawn = 0

        def draw() -> Picture:
            nonlocal num_drawn
            if known and rng.random() < self.repeated:
                return rng.choice(known)
            num_drawn += 1
            width, height = rng.choice(self.sizes)
            known.append(Picture(str(num_drawn), height, width))
            del known[:-_NUM_KNOWN]
            return known[-1]

        moments = arrivals(rng, steady(self.requests_per_s), self.requests_per_s, seconds)
        return [
            SimulatedRequest(at, self.text_in, self.text_out, tuple(draw() for _ in range(self.num_pictures)))
            for at in moments
        ]


def rate_of(requests: Sequence[SimulatedRequest]) -> float:
    """Requests a second of a trace.

    Raises:
        ValueError: fewer than two requests, or all at the same moment.
    """
    if len(requests) < 2 or requests[-1].at <= requests[0].at:
        raise ValueError(f"a trace of {len(requests)} requests has no rate: two moments are the least")
    return (len(requests) - 1) / (requests[-1].at - requests[0].at)


def at_rate(requests: Sequence[SimulatedRequest], factor: float) -> list[SimulatedRequest]:
    """The share `factor` of the requests, evenly picked, at their moments."""
    picked: list[SimulatedRequest] = []
    for number, request in enumerate(requests):
        if math.floor((number + 1) * factor) > math.floor(number * factor):
            picked.append(request)
    return picked
