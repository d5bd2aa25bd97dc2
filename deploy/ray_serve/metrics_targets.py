"""Where the metrics of all replicas are, for Prometheus (`http_sd_configs`): each has ports that it chose itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, TypedDict

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

_TIMEOUT_S = 5.0
_log = logging.getLogger("ray.serve")


class MetricsTarget(TypedDict):
    """An entry of Prometheus's HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]


def metrics_target(job: str, address: str) -> MetricsTarget:
    """Returns the target of the current replica, with the labels that rules and dashboards expect."""
    context = serve.get_replica_context()
    labels = {
        "job": job,
        "pod": context.replica_id.unique_id,
        "ray_application": context.app_name,
        "ray_deployment": context.deployment,
        "ray_node": ray.get_runtime_context().get_node_id(),
    }
    return {"targets": [address], "labels": labels}


async def all_targets(deployments: Sequence[DeploymentHandle[Any]]) -> list[MetricsTarget]:
    """Returns the targets of all replicas that serve and answer in time."""
    answers = await asyncio.gather(*map(_targets, deployments))
    return [target for targets in answers for target in targets]


async def _targets(deployment: DeploymentHandle[Any]) -> list[MetricsTarget]:
    try:
        answers = await deployment.broadcast("metrics_target").results_async(
            timeout_s=_TIMEOUT_S, return_exceptions=True
        )
    except Exception as error:  # none runs yet, or Ray Serve's controller is being replaced
        _log.debug("no replica reports its metrics: %s", error)
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]
