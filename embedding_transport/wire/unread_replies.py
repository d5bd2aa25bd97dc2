"""Replies of a gRPC port that wait for their peer to read: for how long, and how many of one connection."""

from __future__ import annotations

import asyncio
import logging
import weakref
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import Message

from vitrine_vlm.errors import Overloaded
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.shared_timeout import SharedTimeout

_log = logging.getLogger(__name__)
# Replies that one connection may leave unread, before its next calls are refused without their request being read, and
# the part of the time-out after which a reply is one of them. A client that works reads each as it arrives.
MAX_UNREAD = 8
_UNREAD_PART = 0.1
# Likewise the part after which it slows down what is read of the connection.
_SLOW_PART = 0.01


class UnreadReplies:
    """The writes of a port that wait now, by connection, which is known by its address with the port.

    Args:
        budget: of which what a peer never reads is a part.
        timeout_s: longest time in which a reply must be taken, seconds.
    """

    def __init__(self, budget: ByteBudget, timeout_s: float) -> None:
        self.budget = budget
        self.timeout = SharedTimeout(timeout_s)
        self._unread_after_s = timeout_s * _UNREAD_PART
        # When each began, by the clock of the event loop, the oldest first.
        self._waiting: dict[str, dict[BoundedContext, float]] = {}

    def check(self, peer: str) -> None:
        """
        Raises:
            Overloaded: as many replies as one connection may leave unread have waited for long.
        """
        if self._num_waiting(peer, self._unread_after_s) >= MAX_UNREAD:
            raise Overloaded(
                f"{MAX_UNREAD} replies over this connection have not been read for {self._unread_after_s:g} s: "
                "read them before sending more requests",
                retry_after_s=self.timeout.seconds,
            )

    def slowdown(self, peer: str) -> int:
        """How many times longer pauses behind large messages of this connection are: 1 for one that reads its replies.

        What it sends before `check` refuses it costs other clients the less, the less it reads.
        """
        return 1 + self._num_waiting(peer, self.timeout.seconds * _SLOW_PART)

    def _num_waiting(self, peer: str, seconds: float) -> int:
        """The replies over this connection that have waited for so long."""
        latest = asyncio.get_running_loop().time() - seconds
        return sum(began <= latest for began in self._waiting.get(peer, {}).values())

    def begin(self, peer: str, call: BoundedContext) -> None:
        """Counts a write of this call, which writes one message at a time."""
        self._waiting.setdefault(peer, {})[call] = asyncio.get_running_loop().time()

    def end(self, peer: str, call: BoundedContext) -> None:
        waiting = self._waiting[peer]
        del waiting[call]
        if not waiting:
            del self._waiting[peer]


class BoundedContext:
    """A call's context whose writes end, with the call, when the peer does not read."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], peer: str, replies: UnreadReplies) -> None:
        self._context = context
        self._peer = peer
        self._replies = replies
        self._call = asyncio.current_task()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Message | bytes) -> None:
        """
        Raises:
            CancelledError: the peer has not read for too long, as if it had disconnected.
        """
        replies = self._replies
        replies.begin(self._peer, self)
        try:
            with replies.timeout():
                await self._context.write(message)
        except TimeoutError:
            nbytes = len(message) if isinstance(message, bytes) else message.ByteSize()
            self._count_stuck(nbytes)
            _log.info("a call ends: %s has not read %d bytes within %g s", self._peer, nbytes, replies.timeout.seconds)
            raise asyncio.CancelledError("the peer does not read") from None
        finally:
            replies.end(self._peer, self)

    def _count_stuck(self, nbytes: int) -> None:
        """Counts a message that gRPC keeps until the peer reads or disconnects: as long as it keeps the call's task."""
        stuck = self._replies.budget.item()
        with suppress(Overloaded):
            stuck.reserve(nbytes)
        if self._call is not None:
            weakref.finalize(self._call, stuck.release)
