"""The pictures of one load, drawn before it is measured. Only those of one load are held at a time."""

from __future__ import annotations

import os
import random
import zlib
from concurrent.futures import ThreadPoolExecutor

from benchmarks.compare.workloads import Size, Workload
from benchmarks.pictures import random_jpegs

_PER_DRAWING = 16  # pictures that differ by a shift; a new picture is more work
_MAX_THREADS = 16


def pictures_of(workload: Workload, purpose: str) -> list[tuple[bytes, ...]]:
    """Returns the JPEG files of each request of a load.

    Args:
        purpose: what they are for, such as the server's name; another one gives other pictures. The same one gives the
            same.
    """
    seed = zlib.crc32(f"{workload.name}/{purpose}".encode())
    order = picture_order(workload.num_requests * workload.num_pictures, workload.repeated, seed)
    jpegs = draw_pictures(max(order, default=-1) + 1, workload.size, seed)
    each = workload.num_pictures
    return [
        tuple(jpegs[one] for one in order[start * each : (start + 1) * each]) for start in range(workload.num_requests)
    ]


def picture_order(num_sent: int, repeated: float, seed: int) -> list[int]:
    """Returns the number of the picture that is sent at each place: the next new one, or at random one of those before.

    Args:
        repeated: share of the places that repeat a picture, spread evenly.
    """
    rng = random.Random(seed)
    order: list[int] = []
    num_new = 0
    for place in range(num_sent):
        if int((place + 1) * repeated) > int(place * repeated) and num_new:
            order.append(rng.randrange(num_new))
        else:
            order.append(num_new)
            num_new += 1
    return order


def draw_pictures(num_pictures: int, size: Size, seed: int) -> list[bytes]:
    """Returns JPEG files. Each drawing, of 16 of them, has a seed of its own: `seed` and those that follow it."""
    parts = [min(_PER_DRAWING, num_pictures - start) for start in range(0, num_pictures, _PER_DRAWING)]
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        drawn = pool.map(lambda part: random_jpegs(part[1], size, seed + part[0]), enumerate(parts))
        return [jpeg for part in drawn for jpeg in part]
