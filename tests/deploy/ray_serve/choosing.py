"""In place of a deployment handle: chooses by the real rule, without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from vitrine_vlm.embedding_transport.fleet.content_routing import ranked


@dataclass
class Replicas:
    """addresses: of the replicas that there are now; chosen: of every choice so far; num_held: choices not yet left.

    metrics: the address of their metrics.
    """

    addresses: list[str]
    chosen: list[str] = field(default_factory=list)
    metrics: str = ""
    num_held: int = 0

    @contextlib.asynccontextmanager
    async def choose_replica(self, key: bytes, avoided: Sequence[str]) -> AsyncIterator[SimpleNamespace]:
        address = ranked(key, dict.fromkeys(self.addresses, 0), avoided)[0]
        self.chosen.append(address)
        self.num_held += 1
        try:
            yield SimpleNamespace(replica_metadata={"address": address, "metrics": self.metrics})
        finally:
            self.num_held -= 1
