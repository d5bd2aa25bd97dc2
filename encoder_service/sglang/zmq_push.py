"""Pushes messages to SGLang's receivers over ZMQ.

Each message has a connection of its own, which is closed behind it: a receiver that stalls holds up no other message,
and none is connected to for longer than needed. The frames are not copied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import zmq
import zmq.asyncio

from vitrine_vlm.encoder_service.sglang.frames import Frame
from vitrine_vlm.errors import TransportUnavailable

_CONNECT_TIMEOUT_S = 10.0
_MAX_MESSAGES = 512  # in flight at once
# ZMQ still holds up to 8 KiB of a message when it has released its frames.
_LINGER_MS = 2000
_FIRST_POLL_S, _MAX_POLL_S = 0.001, 0.02


class ZmqPush:
    """Create and use it on one event loop."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, 4 * _MAX_MESSAGES)  # closed ones count until they have lingered
        self._room = asyncio.Semaphore(_MAX_MESSAGES)

    async def push(self, endpoint: str, frames: Sequence[Frame]) -> None:
        """Sends one message and returns once its frames may be changed. Nothing says that it was read.

        Args:
            endpoint: tcp://ADDRESS:PORT.

        Raises:
            TransportUnavailable: no receiver accepts a connection there.
        """
        async with self._room:
            socket = self._context.socket(zmq.PUSH)
            try:
                socket.set(zmq.IPV6, 1)
                socket.set(zmq.IMMEDIATE, 1)  # a message waits here until there is a receiver, not in ZMQ
                socket.connect(endpoint)
                try:
                    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                        tracker = await socket.send_multipart(list(frames), copy=False, track=True)
                except TimeoutError:
                    raise TransportUnavailable(
                        f"no receiver accepted a connection at {endpoint} within {_CONNECT_TIMEOUT_S:g} s"
                    ) from None
                pause_s = _FIRST_POLL_S
                while tracker is not None and not tracker.done:  # only a thread could wait for it
                    await asyncio.sleep(pause_s)
                    pause_s = min(1.5 * pause_s, _MAX_POLL_S)
                socket.close(linger=_LINGER_MS)
            finally:
                socket.close(linger=0)  # does nothing where it is closed

    async def close(self) -> None:
        """Waits for closed connections to send what is left, for two seconds at most."""
        await asyncio.to_thread(self._context.destroy, linger=_LINGER_MS)
