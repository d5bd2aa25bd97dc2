"""How long messages and rows take, and which hosts reach each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """latency_s: of a message one way; bytes_a_second: of rows, of one host's port.

    holds_encoder: whether the encoder's item ends only once the rows have left, as with bytes over gRPC.
    """

    latency_s: float
    bytes_a_second: float
    holds_encoder: bool = False


# As measured: a delivery over CUDA IPC takes 0.21 to 0.35 ms, of it 0.16 for a landing copy of 10 MiB and more;
# gRPC over two connections carries 1.28 GB/s from one encoder.
LINKS = {
    "cuda_ipc": Link(0.1e-3, 270e9),
    "grpc": Link(0.2e-3, 1.28e9, holds_encoder=True),
}


class Port:
    """One host's port: rows pass it one behind the other."""

    __slots__ = ("free_at",)

    def __init__(self) -> None:
        self.free_at = 0.0


def transfer(link: Link, source: Port, target: Port, nbytes: int, now: float) -> float:
    """The moment at which so many bytes have left the source and arrived at the target."""
    begin = max(now, source.free_at, target.free_at)
    source.free_at = target.free_at = end = begin + nbytes / link.bytes_a_second
    return end + link.latency_s
