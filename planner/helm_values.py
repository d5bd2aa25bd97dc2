"""Values of the Helm chart that give the planned fleet."""

from __future__ import annotations

from typing import Any

from vitrine_vlm.planner.plan import Plan


def helm_values(plan: Plan, model: str) -> dict[str, Any]:
    """
    Args:
        model: the checkpoint, as the chart's `model`.

    Over CUDA IPC every pod is a pool of its own on one node, because each has another GPU of the claim that they share.
    """
    goals = {"target_itl_ms": 1e3 * plan.goals.itl_s, "target_ttft_ms": 1e3 * plan.goals.ttft_s}
    values: dict[str, Any] = {"model": model}
    if plan.transport != "cuda_ipc" or not plan.num_encoders:
        values["encoders"] = {"pools": {"default": {"replicas": plan.num_encoders}}}
        values["llm"] = {"pools": {"default": {"replicas": plan.num_workers, "config": goals}}}
        return values
    encoder_gpus = [str(number) for number in range(plan.num_encoders)]
    values["colocation"] = {
        "enabled": True,
        "gpuSharing": "resourceClaim",
        "resourceClaim": {"count": plan.num_gpus},
    }
    encoders = {f"gpu{gpu}": {"cudaVisibleDevices": gpu} for gpu in encoder_gpus}
    workers = {
        f"gpu{gpu}": {"cudaVisibleDevices": ",".join([str(gpu), *encoder_gpus]), "config": dict(goals)}
        for gpu in range(plan.num_encoders, plan.num_gpus)
    }
    values["encoders"] = {"pools": {"default": None, **encoders}}
    values["llm"] = {"pools": {"default": None, **workers}}
    return values
