"""One encoder and one vLLM server whose connector uses it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess
from tests.vllm.checkpoints import CheckpointName, Folders
from tests.vllm.questions import Question
from tests.vllm.server import (
    REQUEST_TIMEOUT_S,
    Client,
    Metrics,
    VllmServer,
    client_of,
    ec_transfer_config,
    is_vllm_0_30,
    scrape,
    start_vllm,
)

# Small steps: many pictures have more tokens than one computes, so prefill is cut inside them.
STEP_TOKENS = 64
VLLM_FLAGS = [
    *("--max-num-batched-tokens", str(STEP_TOKENS), "--max-num-seqs", "16"),
    *("--block-size", "32", "--enable-prefix-caching"),
]
IDLE_TIMEOUT_S = 30.0  # shorter than tickets live, so that one which stays behind is seen
# A lease whose Ready crosses the cancellation of its call on the wire is held until it expires.
LEASE_TTL_S = 20.0
LEASES_GONE_TIMEOUT_S = LEASE_TTL_S + 15.0
TENANT_HEADER = "X-Tenant"
TRANSPORTS: dict[CheckpointName, str] = {"qwen3_vl": "shm", "qwen2_5_vl": "grpc", "tiny": "shm"}
# Ranks that each need all rows.
TENSOR_PARALLEL: dict[CheckpointName, int] = {"qwen3_vl": 1, "qwen2_5_vl": 1, "tiny": 2}
# Behind a gateway. Of Qwen3-VL enough for the longest prompt alone, too few for 16 long answers: some are preempted.
KV_FLAGS: dict[CheckpointName, list[str]] = {
    "qwen3_vl": ["--num-gpu-blocks-override", "72"],
    "qwen2_5_vl": [],
    "tiny": [],
}


class Encoder:
    """An encoder that can be killed and started again at the same address."""

    def __init__(self, folder: Path, *flags: str, dtype: str = "float32") -> None:
        self._metrics_port = free_port()
        self._arguments = ["--model", str(folder), "--port", str(free_port()), "--dtype", dtype, *flags]
        self._arguments += ["--metrics-port", str(self._metrics_port)]
        self.start()

    def start(self) -> None:
        self.process = ServiceProcess("vitrine_vlm.encoder_service", *self._arguments)

    def wait_serving(self) -> None:
        self.process.wait_serving()

    def restart(self) -> None:
        """Starts it again after it was killed, and waits until it serves."""
        self.start()
        self.wait_serving()

    def kill(self) -> None:
        self.process.stop(signal.SIGKILL)

    def stop(self) -> None:
        self.process.stop()

    @property
    def address(self) -> str:
        return self.process.addresses["grpc"]

    async def metrics(self) -> Metrics:
        async with aiohttp.ClientSession() as session:
            return await scrape(session, f"http://127.0.0.1:{self._metrics_port}/metrics")


@dataclass
class VllmFleet:
    """`vllm` fetches embeddings from `encoder`; both keep shared memory in `shm_folder` alone.

    has_metrics: whether this vLLM's /metrics has those of the connector.
    gateway: in front of them, or None for clients that ask vLLM itself.
    """

    name: CheckpointName
    folder: Path
    encoder: Encoder
    vllm: VllmServer
    shm_folder: Path
    has_metrics: bool
    gateway: ServiceProcess | None = None

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client of the gateway, or of vLLM where there is none."""
        url = self.vllm.url if self.gateway is None else f"http://{self.gateway.addresses['http']}"
        async with client_of(url, self.folder) as client:
            yield client

    @contextlib.asynccontextmanager
    async def vllm_client(self) -> AsyncIterator[Client]:
        async with client_of(self.vllm.url, self.folder) as client:
            yield client

    def shared_memory(self) -> list[str]:
        return sorted(os.listdir(self.shm_folder))

    async def encoder_total(self, name: str, **labels: str) -> float:
        return (await self.encoder.metrics()).total(f"vitrine_encoder_{name}", **labels)

    async def num_items_sent(self) -> float:
        """Returns how many items the encoder has sent the rows of, since its start."""
        return (await self.encoder.metrics()).total("vitrine_encoder_stage_seconds_count", stage="ship")

    async def num_answers(self) -> float:
        """Returns how many requests vLLM has answered, since its start."""
        return (await self.vllm_metrics()).total("vllm:request_success_total")

    async def vllm_metrics(self) -> Metrics:
        async with self.vllm_client() as client:
            return await client.metrics()

    async def connector_items(self, outcome: str) -> float:
        return (await self.vllm_metrics()).total("vitrine:connector_items_total", outcome=outcome)

    async def leftovers(self) -> dict[str, float]:
        """Returns what is not zero although it should be where no request is left."""
        vllm, encoder = await self.vllm_metrics(), await self.encoder.metrics()
        values = {name: vllm.total(name) for name in ("vllm:num_requests_running", "vllm:num_requests_waiting")}
        if self.has_metrics:
            values["vitrine:connector_landed_bytes"] = vllm.total("vitrine:connector_landed_bytes")
        for name in ("leases_live", "tickets_live", "pool_used_bytes", "held_media_bytes", "admitted_patches"):
            values[name] = encoder.total(f"vitrine_encoder_{name}")
        return {name: value for name, value in values.items() if value}


@contextlib.contextmanager
def start_encoder(folder: Path, *flags: str, dtype: str = "float32") -> Iterator[Encoder]:
    encoder = Encoder(folder, *flags, dtype=dtype)
    try:
        yield encoder
    finally:
        encoder.stop()


@contextlib.contextmanager
def start_fleet(
    python: Path, folders: Folders, name: CheckpointName, cache: Path, vllm_flags: Sequence[str] = ()
) -> Iterator[VllmFleet]:
    """Starts both with one of the checkpoints.

    Args:
        python: of the environment with vLLM.
        cache: the folder that vLLM may write to.
    """
    folder = folders[name]
    with contextlib.ExitStack() as stack:
        shm_folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        encoder_flags = ["--shm-folder", shm_folder, "--lease-ttl-s", str(LEASE_TTL_S)]
        encoder = stack.enter_context(start_encoder(folder, *encoder_flags))
        encoder.wait_serving()
        # However slow the machine is, no item is left to vLLM's own tower for that.
        settings = {"transport": TRANSPORTS[name], "deliver_timeout_s": REQUEST_TIMEOUT_S}
        connector = ec_transfer_config(encoder.address, shm_folder=shm_folder, **settings)
        ranks = ["--tensor-parallel-size", str(TENSOR_PARALLEL[name])]
        vllm = stack.enter_context(start_vllm(python, folder, cache, [*VLLM_FLAGS, *ranks, *vllm_flags, *connector]))
        yield VllmFleet(name, folder, encoder, vllm, Path(shm_folder), has_metrics=not is_vllm_0_30(python))


@contextlib.contextmanager
def start_fleet_with_gateway(python: Path, folders: Folders, name: CheckpointName, cache: Path) -> Iterator[VllmFleet]:
    """Starts them with a gateway in front; vLLM loads no tower."""
    no_tower = ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0})]
    with start_fleet(python, folders, name, cache, [*no_tower, *KV_FLAGS[name]]) as fleet:
        ports = ["--port", "0", "--grpc-port", "0"]
        servers = ["--servers", fleet.vllm.url.removeprefix("http://"), "--encoders", fleet.encoder.address]
        gateway = ServiceProcess("vitrine_vlm.gateway", *servers, *ports, "--tenant-header", TENANT_HEADER)
        try:
            gateway.wait_serving()
            yield replace(fleet, gateway=gateway)
        finally:
            gateway.stop()


async def wait_until_empty(result_of: Callable[[], Awaitable[object]], timeout_s: float = IDLE_TIMEOUT_S) -> None:
    """Waits until `result_of()` is empty; its last result is the failure's message."""
    result: object = "nothing yet"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while result := await result_of():
                await asyncio.sleep(0.1)
    assert not result, f"after {timeout_s} s there is {result}"


async def abort_all(client: Client, questions: Sequence[Question], longest_s: float = 2.0) -> None:
    """Asks for long answers, and disconnects from each after a random time, before it has ended."""
    rng = random.Random(0)

    async def abort(question: Question) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.0, longest_s)):
                answer = await client.ask(question, max_tokens=512, ignore_eos=True)
                raise AssertionError(f"there was an answer: {answer}")

    await asyncio.gather(*map(abort, questions))
