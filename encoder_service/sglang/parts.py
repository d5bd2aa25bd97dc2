"""The parts in work and their receivers, which register before or after the /encode of their part."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitrine_vlm.encoder_service.sglang.frames import Frame
from vitrine_vlm.errors import BadRequest, Overloaded, TransportUnavailable, VitrineError

_MAX_PARTS = 4096


class Part:
    """One part, from the first message about it.

    endpoints: the receivers that have registered. num_receivers: how many there will be; None until the first.
    error_frames: what each receiver is sent instead of rows, once the part has failed.
    """

    def __init__(self) -> None:
        self.endpoints: set[str] = set()
        self.num_receivers: int | None = None
        self.error_frames: list[Frame] | None = None
        self.expires_at = 0.0
        self.is_in_work = False
        self._refusal: VitrineError | None = None
        self._changed = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether all receivers have registered."""
        return len(self.endpoints) == self.num_receivers

    @property
    def has_failed(self) -> bool:
        return self.error_frames is not None

    def add(self, endpoint: str, num_receivers: int) -> None:
        """
        Raises:
            BadRequest: another receiver has registered with another number, or there are more than it says.
        """
        if self.num_receivers not in (None, num_receivers):
            raise BadRequest(f"receive_count is {num_receivers}, and was {self.num_receivers} before")
        if self.is_complete and endpoint not in self.endpoints:
            raise BadRequest(f"all of the {num_receivers} receivers of this part have registered already")
        self.num_receivers = num_receivers
        self.endpoints.add(endpoint)
        self._changed.set()

    def refuse(self, error: VitrineError) -> None:
        """Fails the part: one of its receivers may not be sent to, and a request needs them all."""
        self._refusal = error
        self._changed.set()

    def check(self) -> None:
        """
        Raises:
            VitrineError: that of `refuse`.
        """
        if self._refusal is not None:
            raise self._refusal

    async def receivers(self, deadline: float) -> list[str]:
        """Waits for all receivers; returns their endpoints.

        Args:
            deadline: seconds of the monotonic clock.

        Raises:
            VitrineError: that of `refuse`; TransportUnavailable: not all have registered by the deadline.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while not self.is_complete:
                    self.check()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            num = self.num_receivers or "the"
            raise TransportUnavailable(
                f"{len(self.endpoints)} of {num} receivers have registered at /scheduler_receive_url in time "
                "(--sglang-timeout-s): is the language server's --encoder-transfer-backend zmq_to_scheduler?"
            ) from None
        self.check()
        return sorted(self.endpoints)


class PartTable:
    """The parts of all requests, by the part's req_id. It belongs to one event loop."""

    def __init__(self, ttl_s: float, max_parts: int = _MAX_PARTS, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            ttl_s: seconds for which a part that is not in work waits for its /encode, or failed for its receivers.
            max_parts: parts at most, in work or not.
        """
        self._ttl_s = ttl_s
        self._max_parts = max_parts
        self._clock = clock
        self._parts: dict[str, Part] = {}  # in the order in which they expire

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, req_id: str) -> Part:
        """Returns the part, which is new where there was none.

        Raises:
            Overloaded: there are too many.
        """
        self._discard_expired()
        part = self._parts.get(req_id)
        if part is None:
            if len(self._parts) >= self._max_parts:
                # Without a time: parts end when language servers take them, and only the last of them by their time.
                raise Overloaded(f"{len(self._parts)} parts are in work or wait for receivers: retry later")
            part = Part()
            self._keep(req_id, part)
        return part

    def discard(self, req_id: str) -> None:
        """Removes a part that is done with."""
        self._parts.pop(req_id, None)

    @contextmanager
    def in_work(self, req_id: str) -> Iterator[Part]:
        """The part while it is in work; it is removed at the end, unless it failed and some receiver is to learn so.

        Raises:
            BadRequest: it is in work already, or has failed; Overloaded: see `get`.
        """
        part = self.get(req_id)
        if part.is_in_work or part.has_failed:
            raise BadRequest("a part with this req_id is in work, or has failed: each part needs its own")
        part.is_in_work = True
        try:
            yield part
        finally:
            part.is_in_work = False
            self._finish(req_id, part)

    def _finish(self, req_id: str, part: Part) -> None:
        self.discard(req_id)
        if part.has_failed and not part.is_complete:
            self._keep(req_id, part)

    def _keep(self, req_id: str, part: Part) -> None:
        part.expires_at = self._clock() + self._ttl_s
        self._parts[req_id] = part

    def _discard_expired(self) -> None:
        now = self._clock()
        while (oldest := next(iter(self._parts), None)) is not None and self._parts[oldest].expires_at <= now:
            part = self._parts.pop(oldest)
            if part.is_in_work:  # which ends by itself
                self._keep(oldest, part)
