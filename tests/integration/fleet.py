"""Real processes of one encoder and two LLM workers, and a small gRPC client to ask them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.integration.forked import CAN_FORK, ForkedProcess
from vitrine_vlm.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from vitrine_vlm.sample_models.reference import Media

START_TIMEOUT_S = 120.0
CHUNK_TOKENS = 48
# For tests that run over each.
TRANSPORTS = ("shm", "grpc", pytest.param("cuda_ipc", marks=pytest.mark.gpu))
_KINDS = {"image": llm_pb2.MEDIA_KIND_IMAGE, "video": llm_pb2.MEDIA_KIND_VIDEO}


class ServiceProcess:
    """One `python -m <module>` with its log kept; `addresses` are the ones its LISTENING line names."""

    process: ForkedProcess | subprocess.Popen[str]

    def __init__(self, module: str, *flags: str, prefix: Sequence[str] = (), fork: bool = True) -> None:
        """
        Args:
            prefix: what the command begins with; it is executed then.
            fork: whether the process is a copy of one that has imported the service; otherwise, and where there is a
                GPU, it is executed.
        """
        self.lines: list[str] = []
        self.addresses: dict[str, str] = {}
        self._listening = threading.Event()
        self._serving = threading.Event()
        if fork and CAN_FORK and not prefix:
            self.process = ForkedProcess(module, flags)
        else:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_listening(self) -> dict[str, str]:
        """Waits until the ports are open; the model may still be loading."""
        self._wait(self._listening)
        return self.addresses

    def wait_serving(self) -> dict[str, str]:
        """Waits until the model is loaded, and a worker has tried its encoders."""
        self._wait(self._serving)
        return self.addresses

    def _wait(self, event: threading.Event) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not event.wait(0.05):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the service did not start:\n" + "\n".join(self.lines))

    def stop(self, signal_number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """Sends the signal and returns the exit status; kills after the time-out."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "LISTENING" in line:
                self.addresses.update(re.findall(r"(\w+)=(\S+:\d+)", line))
                self._listening.set()
            elif "SERVING " in line:
                self._serving.set()


@dataclass
class Generated:
    """One finished generation."""

    started: llm_pb2.Started = field(default_factory=llm_pb2.Started)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[llm_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[llm_pb2.TokenLogprobs] = field(default_factory=list)
    finished: llm_pb2.Finished = field(default_factory=llm_pb2.Finished)


class Worker:
    """A gRPC client of one LLM worker."""

    def __init__(self, stub: llm_pb2_grpc.LlmAsyncStub) -> None:
        self._stub = stub

    async def generate(
        self,
        prompt: str | Sequence[int],
        media: Sequence[Media],
        max_tokens: int,
        logprobs: int | None = None,
        **others: Any,
    ) -> Generated:
        """Greedy generation that does not end before `max_tokens`. others: further sampling parameters."""
        sampling = llm_pb2.SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs, **others
        )
        result = Generated()
        async for response in self._stub.Generate(
            llm_pb2.GenerateRequest(prompt=_prompt(prompt, media), sampling=sampling)
        ):
            match response.WhichOneof("event"):
                case "started":
                    result.started = response.started
                case "prompt_logprobs":
                    result.prompt_logprobs.extend(response.prompt_logprobs.logprobs)
                case "delta":
                    result.token_ids.extend(response.delta.token_ids)
                    result.text += response.delta.text
                    result.logprobs.extend(response.delta.logprobs)
                case "finished":
                    result.finished = response.finished
        return result

    async def prefill(self, prompt: str, media: Sequence[Media]) -> llm_pb2.PrefillResponse:
        sampling = llm_pb2.SamplingParams(temperature=0.0, logprobs=0)
        return await self._stub.Prefill(llm_pb2.PrefillRequest(prompt=_prompt(prompt, media), sampling=sampling))


@dataclass
class Fleet:
    """One encoder and a worker for each transport."""

    folder: Path
    factor: int
    """Pixels along a side of one merged token: media of multiples of it are not resized."""
    encoder: ServiceProcess
    worker_processes: dict[str, ServiceProcess]
    workers: dict[str, Worker] = field(default_factory=dict)

    def worker(self, transport: str) -> Worker:
        return self.workers[transport]

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Fleet]:
        async with contextlib.AsyncExitStack() as stack:
            workers = {}
            for transport, process in self.worker_processes.items():
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.addresses["grpc"]))
                workers[transport] = Worker(llm_pb2_grpc.LlmStub(channel))
            yield Fleet(self.folder, self.factor, self.encoder, self.worker_processes, workers)


@contextlib.contextmanager
def start_fleet(
    folder: Path,
    transports: Sequence[str] = ("shm", "grpc", "cuda_ipc") if torch.cuda.is_available() else ("shm", "grpc"),
    encoder_flags: Sequence[str] = (),
    worker_flags: Sequence[str] = (),
) -> Iterator[Fleet]:
    processes: list[ServiceProcess] = []
    try:
        encoder = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(folder), "--port", "0", *encoder_flags)
        processes.append(encoder)
        address = encoder.wait_serving()["grpc"]
        workers = {}
        for transport in transports:
            flags = ["--model", str(folder), "--encoders", address, "--transport", transport, "--port", "0"]
            flags += ["--grpc-port", "0", "--max-num-batched-tokens", str(CHUNK_TOKENS), *worker_flags]
            workers[transport] = ServiceProcess("vitrine_vlm.llm_worker", *flags)
            processes.append(workers[transport])
        for worker in workers.values():
            worker.wait_serving()
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        yield Fleet(folder, vision["patch_size"] * vision["spatial_merge_size"], encoder, workers)
    finally:
        for process in reversed(processes):
            process.stop()


def _prompt(prompt: str | Sequence[int], media: Sequence[Media]) -> llm_pb2.Prompt:
    items = [llm_pb2.MediaItem(kind=_KINDS[item.kind], data=item.data) for item in media]
    if isinstance(prompt, str):
        return llm_pb2.Prompt(text=prompt, media=items)
    return llm_pb2.Prompt(token_ids=llm_pb2.TokenIds(ids=prompt), media=items)
