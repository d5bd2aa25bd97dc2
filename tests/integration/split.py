"""Real processes of one encoder, prefill workers and decode workers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.integration.fleet import CHUNK_TOKENS, Fleet, ServiceProcess

# Of the KV. A lease whose Ready crosses the cancellation of its call on the wire is held until it expires.
LEASE_TTL_S = 20.0


@dataclass
class Split:
    """decoding: its workers are those that decode, one a transport."""

    decoding: Fleet
    prefill_workers: list[ServiceProcess]


def prefill_worker(folder: Path, encoder: str, *flags: str) -> ServiceProcess:
    ports = ["--port", "0", "--grpc-port", "0", "--max-num-batched-tokens", str(CHUNK_TOKENS)]
    ports += ["--lease-ttl-s", str(LEASE_TTL_S)]
    return ServiceProcess(
        "vitrine_vlm.llm_worker", "--role", "prefill", "--model", str(folder), "--encoders", encoder, *ports, *flags
    )


def decode_worker(folder: Path, prefill_workers: str, transport: str, *flags: str) -> ServiceProcess:
    ports = ["--port", "0", "--grpc-port", "0", "--transport", transport]
    return ServiceProcess(
        "vitrine_vlm.llm_worker",
        "--role",
        "decode",
        "--model",
        str(folder),
        "--prefill-workers",
        prefill_workers,
        *ports,
        *flags,
    )


@contextlib.contextmanager
def start_split(
    folder: Path,
    transports: Sequence[str] = ("shm", "grpc", "cuda_ipc") if torch.cuda.is_available() else ("shm", "grpc"),
    num_prefill_workers: int = 1,
    encoder_flags: Sequence[str] = (),
    decode_flags: Sequence[str] = (),
) -> Iterator[Split]:
    processes: list[ServiceProcess] = []
    try:
        encoder = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(folder), "--port", "0", *encoder_flags)
        processes.append(encoder)
        address = encoder.wait_serving()["grpc"]
        prefilling = [prefill_worker(folder, address) for _ in range(num_prefill_workers)]
        processes.extend(prefilling)
        addresses = ",".join(process.wait_serving()["grpc"] for process in prefilling)
        decoding = {transport: decode_worker(folder, addresses, transport, *decode_flags) for transport in transports}
        processes.extend(decoding.values())
        for process in decoding.values():
            process.wait_serving()
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        factor = vision["patch_size"] * vision["spatial_merge_size"]
        yield Split(Fleet(folder, factor, encoder, decoding), prefilling)
    finally:
        for process in reversed(processes):
            process.stop()
