"""The service process of a replica, a child of the replica's actor.

Not objects inside the actor: a tower or decoder that keeps the interpreter busy would hold up Ray's own calls, a crash
in native code would take the actor along without a word of its log, and it is the very program that runs everywhere
else. Whoever kills either of the two ends the replica: without its process it fails its health check, and the process
is bound to the actor's life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from vitrine_vlm.service_runtime.child_process import Child
from vitrine_vlm.service_runtime.supervisor import Supervisor

_POLL_INTERVAL_S = 0.2


class ServiceProcess:
    """Make it with `start`; always `stop` it."""

    def __init__(self, child: Child, supervisor: Supervisor) -> None:
        self._child = child
        self._supervisor = supervisor
        self._watching = supervisor.watch_child(child)

    @classmethod
    async def start(cls, module: str, environment: Mapping[str, str], supervisor: Supervisor) -> ServiceProcess:
        """Starts `python -P -m module`, with these variables added to our environment.

        Args:
            supervisor: the replica's, which sees a failure where the process ends.
        """
        return cls(await Child.start(module, [module], environment), supervisor)

    async def wait_until(self, ready: Callable[[], Awaitable[bool]]) -> None:
        """Polls. There is no time limit: a large checkpoint may still be on its way from the hub.

        Raises:
            ChildFailed: it ended instead.
        """
        while not await ready():
            self._supervisor.check()
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def stop(self, grace_s: float) -> None:
        """Lets it drain, for `grace_s` seconds at most."""
        await self._supervisor.stop(self._watching)
        await self._child.stop(grace_s)
