"""Which gRPC calls of a port read their request now."""

from __future__ import annotations

import asyncio
from collections import Counter

from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.peers import host_of

# Requests that are read at once, those of them from one address, and those on one connection, so that what is sent
# slowly does not keep out other clients, also where they are on one host.
MAX_READING = 6
_MAX_READING_OF_HOST, _MAX_READING_OF_CONNECTION = 4, 2
_MAX_PAUSE_S = 10.0


class ReadingSlots:
    """Which calls read their request now. The newest comes first: a small request does not wait for many large ones.

    Peers are addresses as gRPC writes them, with the port: one each connection.
    """

    def __init__(self) -> None:
        self._num_of_peer: Counter[str] = Counter()
        self._num_of_host: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def acquire(self, peer: str, timeout_s: float) -> None:
        """Waits for a slot, which the caller releases.

        Raises:
            Overloaded: none is free in time.
        """
        if self._has_room(peer):
            self._count(peer)
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting.append((peer, granted))
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.release(peer)
            else:
                self._waiting.remove((peer, granted))
            if not isinstance(error, TimeoutError):
                raise
            raise Overloaded(
                f"too many requests are read, those of {host_of(peer)} among them: retry later",
                retry_after_s=timeout_s,
            ) from None

    def release_after(self, peer: str, pause_s: float) -> None:
        """Releases a slot once `pause_s` seconds have passed for each slot that is taken now."""
        if pause_s > 0:
            pause_s = min(pause_s * self._num_of_host.total(), _MAX_PAUSE_S)
            asyncio.get_running_loop().call_later(pause_s, self.release, peer)
        else:
            self.release(peer)

    def release(self, peer: str) -> None:
        for counter, name in ((self._num_of_peer, peer), (self._num_of_host, host_of(peer))):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        for index in reversed(range(len(self._waiting))):
            waiting_peer, granted = self._waiting[index]
            if not granted.done() and self._has_room(waiting_peer):
                del self._waiting[index]
                self._count(waiting_peer)
                granted.set_result(None)
                return

    def _count(self, peer: str) -> None:
        self._num_of_peer[peer] += 1
        self._num_of_host[host_of(peer)] += 1

    def _has_room(self, peer: str) -> bool:
        return (
            self._num_of_host.total() < MAX_READING
            and self._num_of_host[host_of(peer)] < _MAX_READING_OF_HOST
            and self._num_of_peer[peer] < _MAX_READING_OF_CONNECTION
        )
