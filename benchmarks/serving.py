"""Measures the whole split: OpenAI requests in, tokens out, with one real encoder and one real LLM worker.

`python -m benchmarks.serving` starts both at Qwen3-VL-8B's dims with dummy weights, the encoder on the first visible
GPU and the worker on the second (on the same one if there is no other), sends requests as a client, and prints a
Markdown table: first many requests with a picture and one token of answer each, then decoding streams, alone and with
large pictures in flight. `--small` does the same at small dims, on a CPU, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch

from benchmarks.chat_load import ChatClient, Load, load_rows, run_load
from benchmarks.checkpoints import save_qwen3_vl_8b, save_small_qwen3_vl
from benchmarks.pictures import random_jpegs, show_size
from benchmarks.report import Row, table
from benchmarks.vision_interference import InterferenceResult, VisionInterference
from vitrine_vlm.deploy.launcher.ask import AskFailed
from vitrine_vlm.deploy.launcher.stack import Stack
from vitrine_vlm.service_runtime.child_process import ChildFailed

_SETTLE_S = 1.0  # until the interfering pictures have filled every stage
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """First num_prompts requests with a picture, `concurrency` in flight; then num_streams answers of stream_tokens
    each, alone and with num_interfering requests with interfering_size pictures in flight.

    Sizes are (width, height) in pixels; text_tokens is the length of every prompt's text.
    """

    num_prompts: int
    concurrency: int
    image_size: tuple[int, int]
    text_tokens: int
    num_streams: int
    stream_tokens: int
    num_interfering: int
    interfering_size: tuple[int, int]


FULL = Workload(256, 32, (560, 560), 128, 16, 384, 8, (1920, 1080))
SMALL = Workload(16, 4, (128, 96), 32, 2, 24, 2, (320, 192))


def serving_rows(*, small: bool, encoder_flags: Sequence[str] = (), worker_flags: Sequence[str] = ()) -> list[Row]:
    """Starts the services, measures, stops them. Progress is printed on stderr.

    Raises:
        ChildFailed: a service ended by itself.
        AskFailed: the worker cannot answer plain text.
    """
    workload = SMALL if small else FULL
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        save = save_small_qwen3_vl if small else save_qwen3_vl_8b
        checkpoint = save(Path(folder) / "dummy")
        return asyncio.run(_serve_and_measure(checkpoint, workload, encoder_flags, worker_flags))


async def _serve_and_measure(
    checkpoint: Path, workload: Workload, encoder_flags: Sequence[str], worker_flags: Sequence[str]
) -> list[Row]:
    encoder_environment, worker_environment = _gpus()
    start = time.perf_counter()
    async with Stack.running(
        checkpoint,
        encoder_flags=["--load-format", "dummy", *encoder_flags],
        worker_flags=["--load-format", "dummy", "--max-model-len", "8192", *worker_flags],
        encoder_environment=encoder_environment,
        worker_environment=worker_environment,
    ) as stack:
        starting = VisionInterference.started(workload.interfering_size, workload.num_interfering, workload.text_tokens)
        async with starting as interference:
            drawing = asyncio.to_thread(_Pictures, workload)
            pictures, _, _ = await asyncio.gather(drawing, interference.wait_ready(), stack.wait_ready())
            _log(f"ready after {time.perf_counter() - start:.1f} s")
            return await stack.unless_failed(_measure(stack.base_url, workload, pictures, interference))


class _Pictures:
    def __init__(self, workload: Workload) -> None:
        self.warm_up = random_jpegs(workload.concurrency, workload.image_size, seed=0)
        self.measured = random_jpegs(workload.num_prompts, workload.image_size, seed=1)


async def _measure(url: str, workload: Workload, pictures: _Pictures, interference: VisionInterference) -> list[Row]:
    async with ChatClient.connected(url) as client:
        rows = [Row("transport of rows", await _transport(url))]
        rows += await _measure_pictures(client, workload, pictures)
        return rows + await _measure_decoding(client, url, workload, interference)


async def _measure_pictures(client: ChatClient, workload: Workload, pictures: _Pictures) -> list[Row]:
    warm_up, bodies = (
        [client.body(workload.text_tokens, 1, jpeg) for jpeg in jpegs]
        for jpegs in (pictures.warm_up, pictures.measured)
    )
    await run_load(client, warm_up, workload.concurrency)
    _log(f"{len(bodies)} prompts with a picture, {workload.concurrency} in flight")
    load = await run_load(client, bodies, workload.concurrency)
    _print_failures(load.failures)
    what = f"{show_size(workload.image_size)}, {workload.text_tokens} text tokens, {workload.concurrency} in flight"
    return [Row(f"{what}: {row.figure}", row.measured, row.bar) for row in load_rows(load)]


async def _measure_decoding(
    client: ChatClient, url: str, workload: Workload, interference: VisionInterference
) -> list[Row]:
    def streams(max_tokens: int) -> list[bytes]:
        return [client.body(workload.text_tokens, max_tokens) for _ in range(workload.num_streams)]

    await run_load(client, streams(_WARM_UP_TOKENS), workload.num_streams)
    _log(f"{workload.num_streams} streams of {workload.stream_tokens} tokens")
    alone = await run_load(client, streams(workload.stream_tokens), workload.num_streams)

    _log(f"the same while pictures of {show_size(workload.interfering_size)} are in flight")
    await interference.start(url)
    await asyncio.sleep(_SETTLE_S)
    beside = await run_load(client, streams(workload.stream_tokens), workload.num_streams)
    result = await interference.stop()
    for failures in (alone.failures, beside.failures, result.failures):
        _print_failures(failures)
    return _decoding_rows(workload, alone, beside, result)


def _decoding_rows(workload: Workload, alone: Load, beside: Load, result: InterferenceResult) -> list[Row]:
    what = f"{workload.num_streams} decoding streams"
    pictures = f"with {workload.num_interfering} pictures of {show_size(workload.interfering_size)} in flight"
    num_failures = sum(len(each.failures) for each in (alone, beside, result))
    rows = [Row(f"{what}, {pictures}: failures", str(num_failures), "0")]
    if not (alone.answers and beside.answers):
        return rows
    return [
        *rows,
        Row(f"{what}: ITL, ms, median / p99", f"{alone.itl_ms(50):.2f} / {alone.itl_ms(99):.2f}"),
        Row(f"{what}, {pictures}: ITL, ms, median / p99", f"{beside.itl_ms(50):.2f} / {beside.itl_ms(99):.2f}"),
        Row(f"{what}: p99 ITL with pictures / without", f"{beside.itl_ms(99) / alone.itl_ms(99):.2f}"),
        Row("pictures/s meanwhile", f"{result.requests_per_s:.1f}"),
    ]


async def _transport(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/ready") as response:
        [encoder] = (await response.json())["encoders"]
        return str(encoder["transport"])


def _gpus() -> tuple[dict[str, str], dict[str, str]]:
    """Returns the environments of encoder and worker; the encoder's GPU is visible to the worker for CUDA IPC."""
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    gpus = visible or [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        return {}, {}
    return {"CUDA_VISIBLE_DEVICES": gpus[0]}, {"CUDA_VISIBLE_DEVICES": f"{gpus[1]},{gpus[0]}"}


def _print_failures(failures: list[str]) -> None:
    for failure in failures[:3]:
        _log(f"failed: {failure}")


def _log(message: str) -> None:
    print(f"[benchmark] {message}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small dims and few requests, for any machine")
    parser.add_argument("--encoder-flags", nargs="*", default=[], help="more flags for the encoder, without dashes")
    parser.add_argument("--worker-flags", nargs="*", default=[], help="more flags for the worker, without dashes")
    options = parser.parse_args(arguments)
    flags = [[f"--{flag}" for flag in each] for each in (options.encoder_flags, options.worker_flags)]
    try:
        rows = serving_rows(small=options.small, encoder_flags=flags[0], worker_flags=flags[1])
    except (ChildFailed, AskFailed, aiohttp.ClientError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
