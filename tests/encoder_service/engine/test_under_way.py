"""What is left of the tower's work, as batches come and go."""

from __future__ import annotations

import asyncio
import math

import torch

from vitrine_vlm.encoder_service.engine.batch import Entry
from vitrine_vlm.encoder_service.engine.under_way import UnderWay


async def test_what_is_left() -> None:
    now = 100.0
    under_way = UnderWay(lambda: now)
    batches = [
        [Entry(torch.empty(4, 1), (1, 2, 2), asyncio.get_running_loop().create_future(), math.inf, None)]
        for _ in range(3)
    ]
    assert under_way.left_s == 0
    under_way.begin(batches[0], 5.0)
    under_way.begin(batches[1], 3.0)
    now += 2
    assert under_way.left_s == 6
    now += 1
    under_way.end(batches[0])  # two seconds early
    assert under_way.left_s == 3
    now += 4
    assert under_way.left_s == -1, "the second takes longer than was thought"
    under_way.begin(batches[2], 2.0)
    under_way.end(batches[2])  # was never launched
    assert under_way.left_s == -1
    under_way.end(batches[1])
    assert under_way.left_s == 0
    now += 9
    under_way.begin(batches[0], 1.0)
    assert under_way.left_s == 1
