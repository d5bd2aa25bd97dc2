"""The load client against a real worker and encoder."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from benchmarks.chat_load import ChatClient, run_load
from benchmarks.checkpoints import save_small_qwen3_vl
from benchmarks.compare.measuring import Target, TimeLimits, measure
from benchmarks.compare.workloads import Workload
from benchmarks.pictures import random_jpegs
from vitrine_vlm.deploy.launcher.ask import AskFailed
from vitrine_vlm.deploy.launcher.stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

SIZE = (96, 64)
NUM_IMAGE_TOKENS = 3 * 2
DUMMY = ["--load-format", "dummy"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    folder: Path = save_small_qwen3_vl(tmp_path_factory.mktemp("checkpoint"))
    async with Stack.running(folder, encoder_flags=DUMMY, worker_flags=DUMMY) as stack:
        await stack.wait_ready()
        yield stack.base_url


async def usage(url: str, body: bytes) -> dict[str, Any]:
    """What the server counts for the same request, asked without streaming."""
    whole = {name: value for name, value in json.loads(body).items() if not name.startswith("stream")}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=whole) as response:
        return dict((await response.json())["usage"])


async def test_requests_are_as_long_as_asked(url: str) -> None:
    [jpeg] = random_jpegs(1, SIZE)
    async with ChatClient.connected(url) as client:
        template, short, long, picture = [
            (await usage(url, client.body(num_tokens, 5, *jpegs)))["prompt_tokens"]
            for num_tokens, jpegs in ((1, ()), (201, ()), (401, ()), (201, (jpeg,)))
        ]
        answer = await client.ask(client.body(16, 5, jpeg))
    assert short - template == pytest.approx(200, abs=2)
    assert long - short == pytest.approx(200, abs=2)
    assert picture - short == pytest.approx(NUM_IMAGE_TOKENS + 2, abs=2)  # and a token on each side
    assert (answer.num_tokens, len(answer.itl_s)) == (5, 4)
    assert answer.ttft_s > 0 and min(answer.itl_s) >= 0


async def test_failures_are_counted_and_do_not_end_the_load(url: str) -> None:
    async with ChatClient.connected(url) as client:
        good, bad = client.body(16, 3), client.body(16, 3, b"no picture")
        load = await run_load(client, [good, bad, good, bad, bad], concurrency=2)
    assert (len(load.answers), len(load.failures)) == (2, 3)
    assert all("HTTP 4" in failure for failure in load.failures)
    assert load.tokens_per_s == pytest.approx(3 * load.requests_per_s)


async def test_a_load_ends_when_its_time_is_up(url: str) -> None:
    counter = itertools.count(5.0)
    async with ChatClient.connected(url) as client:
        target = Target("some", url, client, cpu_s=lambda: next(counter))
        measured = await measure(Workload("some", 500, 2, 4, SIZE), target, TimeLimits(warm_up_s=0.0, load_s=0.2))
    load = measured.load
    assert 2 <= len(load.answers) < 500 and not load.failures
    assert load.seconds > 0.2, "answers in flight were not waited for"
    assert (measured.cpu_s, measured.energy_j, measured.beside) == (1.0, None, None)


async def test_a_name_that_is_not_served_is_an_error(url: str) -> None:
    with pytest.raises(AskFailed, match="404"):
        async with ChatClient.connected(url, "another"):
            pass


async def run_command(*flags: str) -> tuple[int | None, str, str]:
    command = [sys.executable, "-m", "benchmarks.chat_load", *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_the_command_prints_a_table(url: str) -> None:
    few = ["--num-prompts", "6", "--concurrency", "3", "--image-size", "96x64", "--text-tokens", "16"]
    status, output, errors = await run_command("--url", url, *few, "--num-images", "2", "--max-tokens", "4")
    assert status == 0, errors
    assert "| failures | 0 | 0 |" in output
    for figure in ("requests/s", "TTFT, ms, median / p99", "output tokens/s", "ITL, ms, median / p99"):
        assert f"| {figure} |" in output
    status, output, _ = await run_command("--url", url, *few[:-1], "9000")  # longer than the model takes
    assert status == 1
    assert output.splitlines()[2:] == ["| failures | 0 | 6 |"]


async def test_no_two_pictures_are_alike() -> None:
    pictures = random_jpegs(50, SIZE)
    assert len(set(pictures)) == 50
    assert pictures == random_jpegs(50, SIZE)
    assert not set(pictures) & set(random_jpegs(50, SIZE, seed=1))
