"""How long messages and rows take, and which hosts reach each other."""

from __future__ import annotations

import random
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


# TCP sends what was lost again after 200 ms at the earliest, where nothing behind it arrives (RFC 6298 and Linux's
# least timeout).
_SENT_AGAIN_S = 0.2


class Port:
    """One host's port: rows pass it one behind the other.

    latency_factor: by which messages take longer than the link's latency; loss: part of them that is sent again.
    """

    __slots__ = ("_rng", "free_at", "latency_factor", "loss")

    def __init__(self, rng: random.Random) -> None:
        self.free_at = 0.0
        self.latency_factor = 1.0
        self.loss = 0.0
        self._rng = rng

    def latency_s(self, link: Link) -> float:
        """Of the next message over the link from or to this port, one way."""
        seconds = link.latency_s * self.latency_factor
        if self.loss and self._rng.random() < self.loss:
            seconds += _SENT_AGAIN_S
        return seconds


def transfer(link: Link, source: Port, target: Port, nbytes: int, now: float) -> float:
    """The moment at which so many bytes have left the source and passed the target's port."""
    begin = max(now, source.free_at, target.free_at)
    source.free_at = target.free_at = end = begin + nbytes / link.bytes_a_second
    return end
