"""What decoding in processes costs: CPU time, items a second and latency of preprocessing, beside decoding on threads.

    python -m benchmarks.media_decoding

Rounds of both alternate, so that what else the machine does falls on both. Items are opened and made patches of
as in an encoder without a GPU; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitrine_vlm.encoder_service.decoding.decoder_pool import DecoderPool
from vitrine_vlm.encoder_service.decoding.media_decoder import InProcessDecoder
from vitrine_vlm.encoder_service.decoding.work import DecodeWork
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocess_pool import PreprocessPool
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.service_runtime.memory import reuse_message_memory
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.threads import set_switch_interval
from vitrine_vlm.types import MediaItem

# Those of Qwen3-VL's released checkpoints.
SETTINGS = ProcessorSettings(
    frame_sampling="even",
    video_bounds="volume",
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=65536,
    max_pixels=16777216,
    video_min_pixels=4096,
    video_max_pixels=25165824,
    video_fps=2.0,
    video_min_frames=4,
    video_max_frames=768,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
LIMITS = MediaLimits()


class Threads:
    """Decoders of the process itself, as many as there are threads."""

    class Decoder(InProcessDecoder):
        def kill(self) -> None:
            """Is not called: nothing is cancelled here."""

    def __init__(self, num_threads: int) -> None:
        self.num_processes = num_threads
        self._idle = asyncio.Semaphore(num_threads)

    @asynccontextmanager
    async def decoder(self, work: DecodeWork) -> AsyncIterator[Decoder]:
        async with self._idle:
            yield self.Decoder()

    async def close(self) -> None:
        pass


def picture(width: int, height: int, image_format: str, **options: object) -> bytes:
    """Smooth colours with some noise, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, image_format, **options)
    return file.getvalue()


def cpu_s(processes: DecoderPool) -> float:
    """CPU time so far of this process and its decoders, none of whose threads ends here."""
    of_threads = (file for pid in processes.pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return time.process_time() + sum(int(file.read_text().split()[0]) / 1e9 for file in of_threads)


@dataclass(frozen=True)
class Figures:
    """Of a round: items a second, the median latency, and CPU time an item, seconds."""

    rate: float
    latency_s: float
    cpu_s: float


async def run_items(
    pool: PreprocessPool, processes: DecoderPool, item: MediaItem, num_items: int, at_once: int
) -> Figures:
    assert item.data is not None
    files, latencies, left = (item.data,), [], num_items

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            start = time.perf_counter()
            opened, _ = await pool.open(item, files)
            await pool.patches(opened)
            latencies.append(time.perf_counter() - start)

    start, cpu_before_s = time.perf_counter(), cpu_s(processes)
    await asyncio.gather(*(client() for _ in range(at_once)))
    return Figures(
        num_items / (time.perf_counter() - start),
        statistics.median(latencies),
        (cpu_s(processes) - cpu_before_s) / num_items,
    )


async def measure(num_rounds: int, seconds: float, num_threads: int) -> None:
    supervisor = Supervisor()
    processes = DecoderPool(
        num_threads,
        max_pixels=LIMITS.max_pixels,
        image_timeout_s=5,
        video_timeout_s=30,
        max_decoded_nbytes=1 << 31,
    )
    processes.start(supervisor)
    preprocessor = Preprocessor(SETTINGS, LIMITS)
    pools = {
        "threads": PreprocessPool(preprocessor, Threads(num_threads), revision=""),
        "processes": PreprocessPool(preprocessor, processes, revision=""),
    }
    items = {
        "560x560 PNG": picture(560, 560, "PNG"),
        "560x560 JPEG": picture(560, 560, "JPEG", quality=90),
        "1920x1080 JPEG": picture(1920, 1080, "JPEG", quality=90),
        "1920x1080 JPEG, progressive": picture(1920, 1080, "JPEG", quality=90, progressive=True),
    }
    print(f"{'item':<28} {'at once':>7} {'threads':>28} {'processes':>28}   rate, CPU time: ratio of medians")
    for name, data in items.items():
        item = MediaItem("image", data=data)
        for at_once in (1, 2 * num_threads):
            first = await run_items(pools["threads"], processes, item, 8, at_once)
            num_items = max(8, int(seconds * first.rate))
            measured: dict[str, list[Figures]] = {each: [] for each in pools}
            for number in range(num_rounds):
                for each in sorted(pools, reverse=bool(number % 2)):
                    measured[each].append(await run_items(pools[each], processes, item, num_items, at_once))
            threads, others = (_medians(each) for each in measured.values())
            print(
                f"{name:<28} {at_once:>7} {_show(threads)} {_show(others)}   "
                f"{others.rate / threads.rate:.3f}, {others.cpu_s / threads.cpu_s:.3f}",
                flush=True,
            )
    for pool in pools.values():
        await pool.close()
    await supervisor.close()


def _medians(rounds: list[Figures]) -> Figures:
    return Figures(
        statistics.median(each.rate for each in rounds),
        statistics.median(each.latency_s for each in rounds),
        statistics.median(each.cpu_s for each in rounds),
    )


def _show(figures: Figures) -> str:
    return f"{figures.rate:6.1f}/s {figures.latency_s * 1e3:6.2f} ms {figures.cpu_s * 1e3:5.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="of each kind")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round")
    parser.add_argument(
        "--threads", type=int, default=max(2, len(os.sched_getaffinity(0))), help="items decoded at once"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reuse_message_memory()
    set_switch_interval()
    asyncio.run(measure(arguments.rounds, arguments.seconds, arguments.threads))


if __name__ == "__main__":
    main()
