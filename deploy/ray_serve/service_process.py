"""The service process of a replica, a child of the replica's actor.

Not objects inside the actor: a tower or decoder that keeps the interpreter busy would hold up Ray's own calls, a crash
in native code would take the actor along without a word of its log, and it is the very program that runs everywhere
else. Whoever kills either of the two ends the replica: without its process it fails its health check, and the process
is bound to the actor's life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from service_runtime.child_process import Child

_POLL_INTERVAL_S = 0.2


class ServiceProcess:
    """Make it with `start`; always `stop` it."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._failure = asyncio.create_task(child.failed())

    @classmethod
    async def start(cls, module: str, environment: Mapping[str, str]) -> ServiceProcess:
        """Starts `python -m module`, with these variables added to our environment."""
        return cls(await Child.start(module, [module], environment))

    def check_alive(self) -> None:
        """
        Raises:
            ChildFailed: it ended.
        """
        if self._failure.done():
            raise self._failure.result()

    async def wait_until(self, ready: Callable[[], Awaitable[bool]]) -> None:
        """Polls. There is no time limit: a large checkpoint may still be on its way from the hub.

        Raises:
            ChildFailed: it ended instead.
        """
        while not await ready():
            self.check_alive()
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def stop(self, grace_s: float) -> None:
        """Lets it drain, for `grace_s` seconds at most."""
        await self._child.stop(grace_s)
        await self._failure
