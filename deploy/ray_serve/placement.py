"""Replicas for which the cluster has no room: what is missing is logged, and those that are to stop end at once.

Ray Serve waits for a stopping replica to drain, all of `graceful_shutdown_timeout_s`, even if it was never placed and
has no process that could answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ray
from ray._private.state import actors  # Ray's public API knows the same through its dashboard alone, which need not run
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

_INTERVAL_S = 2.0
# Of an application that is deleted: Ray Serve may go on to the next deployment only once another one has drained.
_LAST_INTERVAL_S, _QUIET_S, _LONGEST_S = 0.5, 10.0, 600.0

_log = logging.getLogger("ray.serve")


def shortages(needed: Mapping[str, float], there: Mapping[str, float]) -> list[str]:
    """Returns in words what the cluster has too little of.

    Args:
        needed, there: amounts by the names that Ray has for its resources, such as CPU.
    """
    return [
        f"the application needs {amount:g} {name}s, the cluster has {there.get(name, 0.0):g}: replicas wait until "
        f"nodes are added; lower num_{name.lower()}s"
        for name, amount in needed.items()
        if amount > there.get(name, 0.0)
    ]


def warn_of_shortages(needed: Mapping[str, float]) -> None:
    """Logs at once why other replicas wait, which Ray Serve says after half a minute, and not of how much.

    Called by each replica that has been placed, as none of them need be the first, or the only one.
    """
    for shortage in shortages(needed, ray.cluster_resources()):  # type: ignore[no-untyped-call]
        _log.warning("%s", shortage)


def stopping(details: Mapping[str, Any], application: str, actor_names: Collection[str]) -> list[str]:
    """Returns those of the actors, which are replicas of the application, that are to stop.

    Args:
        details: Ray Serve's ServeInstanceDetails.
    """
    found = details["applications"].get(application)
    if found is None or found["status"] == "DELETING":  # without its replicas
        return sorted(actor_names)
    replicas = [replica for deployment in found["deployments"].values() for replica in deployment["replicas"]]
    return sorted(
        replica["actor_name"]
        for replica in replicas
        if replica["state"] == "STOPPING" and replica["actor_name"] in actor_names
    )


def end_never_placed(application: str) -> bool:
    """Ends those replicas of the application that are to stop and have no process yet. Blocking.

    Returns:
        Whether any replica of the application has no process yet.
    """
    try:
        waiting = {actor["Name"] for actor in actors(actor_state_name="PENDING_CREATION").values()}
        pending = {name for name in waiting if name.startswith(f"SERVE_REPLICA::{application}#")}
        if not pending:
            return False
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        get: Callable[..., Any] = ray.get  # its overloads take an actor's answer for a list
        for name in stopping(get(controller.get_serve_instance_details.remote()), application, pending):
            _log.info("%s is to stop and was never placed: it is ended", name)
            ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))
    except (RayError, ValueError) as error:  # the controller is being replaced, or the replica is gone
        _log.debug("replicas that were never placed: %s", error)
    return True


async def watch(application: str) -> None:
    """Ends, as long as it runs, replicas that are to stop and were never placed."""
    while True:
        await asyncio.to_thread(end_never_placed, application)
        await asyncio.sleep(_INTERVAL_S)


class LastRounds:
    """An actor that ends never placed replicas of an application that is deleted, and then itself.

    Ray Serve stops the gateway first, and deployment by deployment what it calls.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        threading.Thread(target=self._end_all, name="placement", daemon=True).start()

    def _end_all(self) -> None:
        quiet_since = begin = time.monotonic()
        try:
            while (now := time.monotonic()) - quiet_since < _QUIET_S and now - begin < _LONGEST_S:
                if end_never_placed(self._application):
                    quiet_since = now
                time.sleep(_LAST_INTERVAL_S)
        finally:  # nothing else ends a detached actor
            ray.kill(ray.get_runtime_context().current_actor)


def outlive(application: str) -> None:
    """Leaves an actor behind where replicas of the application have no process yet. Blocking."""
    if end_never_placed(application):
        name = f"vitrine_placement_{application}"
        options = {"name": name, "namespace": SERVE_NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor: Any = ray.remote(LastRounds)
        actor.options(num_cpus=0, **options).remote(application)
