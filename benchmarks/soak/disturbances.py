"""What goes wrong during a soak: encoders are killed, workers are replaced."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.soak.services import Service, ServiceEnded


@dataclass(frozen=True)
class Disturbance:
    """at: seconds of `time.monotonic`. down_s: until the service could be used again."""

    at: float
    service: str
    what: str
    down_s: float


async def kill_encoders(
    encoders: Sequence[Service], every_s: float, until: float, seed: int, disturbances: list[Disturbance]
) -> None:
    """Kills one of the encoders (SIGKILL) every so often, once the one before is up again.

    Args:
        until: seconds of `time.monotonic`; none is killed later.

    Raises:
        ServiceEnded: an encoder ended by itself, or does not start again.
    """
    chosen = random.Random(seed)
    while (begin := time.monotonic()) < until:
        encoder = chosen.choice(encoders)
        encoder.check_running()
        await encoder.kill()
        await encoder.start()
        await encoder.wait_ready()
        disturbances.append(Disturbance(begin, encoder.name, "killed", time.monotonic() - begin))
        await asyncio.sleep(max(0.0, begin + every_s - time.monotonic()))


async def replace_workers(
    workers: Sequence[Service], every_s: float, until: float, disturbances: list[Disturbance]
) -> None:
    """Restarts one worker after the other (SIGTERM, which has it finish its requests).

    Args:
        until: seconds of `time.monotonic`; none is restarted later.

    Raises:
        ServiceEnded: a worker ended by itself, did not end well, or does not start again.
    """
    index = 0
    while (begin := time.monotonic()) < until:
        worker = workers[index % len(workers)]
        worker.check_running()
        if status := await worker.stop():
            raise ServiceEnded(f"{worker.name} ended with {status} when it was asked to stop")
        await worker.start()
        await worker.wait_ready()
        disturbances.append(Disturbance(begin, worker.name, "restarted", time.monotonic() - begin))
        index += 1
        await asyncio.sleep(max(0.0, begin + every_s - time.monotonic()))
