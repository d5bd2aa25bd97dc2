"""What is left of the tower's work, as batches come and go."""

from __future__ import annotations

import asyncio
import math

import torch

from vitrine_vlm.encoder_service.engine.batch import QueuedItem
from vitrine_vlm.encoder_service.engine.in_flight_batches import InFlightBatches


async def test_what_is_left() -> None:
    now = 100.0
    in_flight = InFlightBatches(lambda: now)
    batches = [
        [QueuedItem(torch.empty(4, 1), (1, 2, 2), asyncio.get_running_loop().create_future(), math.inf, None)]
        for _ in range(3)
    ]
    assert (in_flight.left_s, in_flight.front) == (0, None)
    in_flight.add(batches[0], 5.0)
    in_flight.add(batches[1], 3.0)
    now += 2
    assert (in_flight.left_s, in_flight.front) == (6, (2, 5))
    now += 1
    in_flight.remove(batches[0])  # two seconds early
    assert in_flight.left_s == 3
    now += 4
    assert in_flight.left_s == -1, "the second takes longer than expected"
    in_flight.add(batches[2], 2.0)
    in_flight.remove(batches[2])  # was never launched
    assert in_flight.left_s == -1
    in_flight.remove(batches[1])
    assert in_flight.left_s == 0
    now += 9
    in_flight.add(batches[0], 1.0)
    assert in_flight.left_s == 1
