"""One question to all replicas of a deployment."""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

_log = logging.getLogger("ray.serve")


async def answers_of_all(deployment: DeploymentHandle[Any], method: str, timeout_s: float) -> list[Any]:
    """Returns what the method returns on each replica that runs and answers in time."""
    try:
        answers = await deployment.broadcast(method).results_async(timeout_s=timeout_s, return_exceptions=True)
    except Exception as error:  # none runs yet, or Ray Serve's controller is being replaced
        _log.debug("no replica answers %s: %s", method, error)
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]
