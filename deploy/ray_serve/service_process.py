"""The service process of a replica, a child of the replica's actor.

The service does not run inside the actor, because a tower or decoder that keeps the interpreter busy would delay Ray's
own calls, and a crash in native code would end the actor without a log; also, the process is the same program as in all
other deployments. The end of either ends the replica: without its process it fails its health check, and the process
ends with the actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from vitrine_vlm.deploy.ray_serve import service_log
from vitrine_vlm.service_runtime.child_process import Child
from vitrine_vlm.service_runtime.supervisor import Supervisor

_POLL_INTERVAL_S = 0.2


class ServiceProcess:
    """A running service process. Create it with `start`, and always call `stop`."""

    def __init__(self, child: Child, supervisor: Supervisor) -> None:
        self._child = child
        self._supervisor = supervisor
        self._watching = supervisor.watch_child(child)

    @classmethod
    async def start(cls, module: str, environment: Mapping[str, str], supervisor: Supervisor) -> ServiceProcess:
        """Starts `python -P -m module` with these variables added to this process's environment.

        Its output goes to the replica's log, see `service_log`.

        Args:
            supervisor: the replica's, to which the end of the process is a failure.
        """
        child = await Child.start(module, [module], environment, write=service_log.write)
        return cls(child, supervisor)

    async def wait_until(self, ready: Callable[[], Awaitable[bool]]) -> None:
        """Polls `ready`. There is no time limit: a large checkpoint may take long to download.

        Raises:
            ChildFailed: the process ended instead.
        """
        while not await ready():
            self._supervisor.check()
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def stop(self, grace_s: float) -> None:
        """Terminates the process, which may drain for at most `grace_s` seconds."""
        await self._supervisor.stop(self._watching)
        await self._child.stop(grace_s)
