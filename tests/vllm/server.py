"""A process of vLLM's OpenAI server, and what a client asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.encoder_service.test_command_line import free_port
from tests.vllm.questions import NUM_TOKENS, Question

START_TIMEOUT_S = 540.0
REQUEST_TIMEOUT_S = 60.0


def vllm_environment(cache: Path) -> dict[str, str]:
    """Returns the environment of every process with vLLM: offline, one thread, nothing written outside `cache`."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CONFIG_ROOT": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the tests' other processes need the cores, too
        "VLLM_NO_USAGE_STATS": "1",
    }


@functools.cache
def is_vllm_0_30(python: Path) -> bool:
    """Whether this environment's vLLM is of 0.30, which has no metrics of connectors, and other times of videos."""
    command = [str(python), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
    version = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return version.startswith("0.30.")


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` with its log kept."""

    def __init__(self, python: Path, folder: Path, cache: Path, flags: Sequence[str] = ()) -> None:
        self.lines: list[str] = []
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [
                *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
                *("--served-model-name", folder.name, "--host", "127.0.0.1", "--port", str(port)),
                *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=vllm_environment(cache),
            cwd=cache,  # not the repository, whose folders must not be importable by chance
            process_group=0,  # with those of its engine and its workers
        )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("vLLM did not start:\n" + self.log())
            time.sleep(0.2)

    def wait_ended(self) -> int:
        """Returns the exit status of a server that does not start."""
        return self.process.wait(START_TIMEOUT_S)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, TimeoutError):
            return False

    def log(self) -> str:
        return "\n".join(self.lines)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends the server, and then what is left of its processes: one that ends while it starts leaves its engine."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())


@contextlib.contextmanager
def start_vllm(python: Path, folder: Path, cache: Path, flags: Sequence[str] = ()) -> Iterator[VllmServer]:
    server = VllmServer(python, folder, cache, flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def ec_transfer_config(encoders: str, **settings: Any) -> list[str]:
    """Returns the flags with which vLLM loads the connector."""
    config = {
        "ec_connector": "VitrineConnector",
        "ec_connector_module_path": "vitrine_vlm.vllm_connector.connector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"encoders": encoders, **settings},
    }
    return ["--ec-transfer-config", json.dumps(config)]


@dataclass(frozen=True)
class Answer:
    """One response to a chat completion: its status, and the token ids or the error's body."""

    status: int
    token_ids: list[int]
    error: str = ""


class Client:
    """Asks an OpenAI server, vLLM's or one in front of it."""

    def __init__(self, url: str, model: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._model = model
        self._session = session

    async def ask(self, question: Question, headers: dict[str, str] | None = None, **body: Any) -> Answer:
        """Asks for a greedy answer; `body` overrides the request's fields."""
        body = {"messages": question.messages, "max_tokens": NUM_TOKENS, **body}
        body = {"model": self._model, "temperature": 0.0, "return_token_ids": True, **body}
        async with self._session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as response:
            text = await response.text()
            if response.status != 200:
                return Answer(response.status, [], text)
            return Answer(200, json.loads(text)["choices"][0]["token_ids"])

    async def ask_all(self, questions: Sequence[Question], in_flight: int = 16) -> list[Answer]:
        """Asks all of them, `in_flight` at a time."""
        free = asyncio.Semaphore(in_flight)

        async def ask(question: Question) -> Answer:
            async with free:
                return await self.ask(question)

        return list(await asyncio.gather(*map(ask, questions)))

    async def metrics(self) -> Metrics:
        return await scrape(self._session, f"{self.url}/metrics")


@contextlib.asynccontextmanager
async def client_of(url: str, folder: Path) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Client(url, folder.name, session)


class Metrics:
    """The samples of a /metrics page."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum over all series of the name that have these labels.

        Raises:
            KeyError: there is none.
        """
        values = [
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(f"no series {name} with {labels}")
        return float(sum(values))


async def scrape(session: aiohttp.ClientSession, url: str) -> Metrics:
    async with session.get(url) as response:
        return Metrics(await response.text())
