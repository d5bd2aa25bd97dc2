"""Where the metrics of all replicas are, for Prometheus (`http_sd_configs`): each has ports that it chose itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypedDict

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from vitrine_vlm.deploy.ray_serve.broadcasts import answers_of_all

# Values of the label `job`, which are also those of the door's `/metrics?job=`.
ENCODER_JOB, LLM_JOB = "vitrine-encoder", "vitrine-llm"
_TIMEOUT_S = 5.0


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
    answers = await asyncio.gather(*(answers_of_all(each, "metrics_target", _TIMEOUT_S) for each in deployments))
    return [target for targets in answers for target in targets]
