"""A number of requests in flight against one host, as a benchmark keeps them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass

from vitrine_vlm.planner.costs import Costs
from vitrine_vlm.planner.one_gpu import Host
from vitrine_vlm.simulation.tower import item_of
from vitrine_vlm.simulation.workload import Picture, SimulatedRequest
from vitrine_vlm.types import RowsEvent


@dataclass(frozen=True)
class Load:
    """Requests of one kind, so many in flight at a time; no picture comes twice. size: (width, height) in pixels.

    beside: pictures of 1920x1080 that are kept in flight meanwhile, one token of answer each.
    """

    num_requests: int
    in_flight: int
    num_generated: int
    size: tuple[int, int] = (560, 560)
    num_pictures: int = 1
    num_text: int = 128
    beside: int = 0


@dataclass(frozen=True)
class Figures:
    """requests_per_s: answered. ttft_s: the median. token_s: seconds from token to token, the mean over all answers.

    beside_per_s: pictures a second that were kept in flight beside.
    """

    requests_per_s: float
    ttft_s: float
    token_s: float = 0.0
    beside_per_s: float = 0.0


async def measure_load(host: Host, load: Load, costs: Costs) -> Figures:
    """Runs the load through worker and encoder; a round of it comes first and is not counted."""
    loop, keys = host.loop, itertools.count()

    def request(size: tuple[int, int], num_pictures: int, num_text: int, num_generated: int) -> SimulatedRequest:
        pictures = tuple(Picture(str(next(keys)), size[1], size[0]) for _ in range(num_pictures))
        return SimulatedRequest(0.0, num_text, num_generated, pictures)

    async def ask(asked: SimulatedRequest) -> tuple[float, float]:
        sent = loop.time()
        pixels = sum(each.height * each.width for each in asked.pictures)
        await asyncio.sleep(costs.front_s + costs.front_a_pixel_s * pixels)
        outcome = await host.worker.answer(asked)
        assert outcome.first_token_at is not None and outcome.ended_at is not None, outcome.error
        return outcome.first_token_at - sent, outcome.ended_at - outcome.first_token_at

    async def client(numbers: Iterator[int]) -> list[tuple[float, float]]:
        of = (load.size, load.num_pictures, load.num_text, load.num_generated)
        return [await ask(request(*of)) for _ in numbers]

    num_beside = 0

    async def beside() -> None:
        nonlocal num_beside
        while True:
            await ask(request((1920, 1080), 1, load.num_text, 1))
            num_beside += 1

    disturbing = [loop.create_task(beside()) for _ in range(load.beside)]
    await asyncio.gather(*(client(iter(range(1))) for _ in range(load.in_flight)))
    started, num_before = loop.time(), num_beside
    numbers = iter(range(load.num_requests))
    rounds = await asyncio.gather(*(client(numbers) for _ in range(load.in_flight)))
    answers = list(itertools.chain.from_iterable(rounds))
    seconds = loop.time() - started
    num_beside -= num_before
    for task in disturbing:
        if task.done():
            task.result()  # it has failed: the others had fewer beside them
        task.cancel()
    await asyncio.gather(*disturbing, return_exceptions=True)
    ttft_s = sorted(ttft_s for ttft_s, _ in answers)
    tokens = len(answers) * (load.num_generated - 1)
    return Figures(
        len(answers) / seconds,
        ttft_s[(len(ttft_s) - 1) // 2],
        sum(rest_s for _, rest_s in answers) / tokens if tokens else 0.0,
        num_beside / seconds,
    )


async def measure_encoder(host: Host, load: Load, costs: Costs) -> Figures:
    """Encodes pictures, so many in flight, without a worker's steps."""
    loop, keys = host.loop, itertools.count()
    width, height = load.size

    async def client(numbers: Iterator[int]) -> list[float]:
        took: list[float] = []
        for _ in numbers:
            started = loop.time()
            await asyncio.sleep(costs.front_s + costs.front_a_pixel_s * width * height)
            key = str(next(keys))
            async with aclosing(host.worker.client.encode([item_of(Picture(key, height, width))], key)) as events:
                async for event in events:
                    if isinstance(event, RowsEvent):
                        event.rows.release()
            took.append(loop.time() - started)
        return took

    started = loop.time()
    numbers = iter(range(load.num_requests))
    rounds = await asyncio.gather(*(client(numbers) for _ in range(load.in_flight)))
    took = sorted(itertools.chain.from_iterable(rounds))
    return Figures(len(took) / (loop.time() - started), took[(len(took) - 1) // 2])
