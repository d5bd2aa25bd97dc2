"""Whether a pod may be evicted: its PodDisruptionBudget.

Source: kubernetes/pkg/registry/core/pod/storage/eviction.go and pkg/controller/disruption/disruption.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tests.cluster.deployments import Deployment, of_percentage
from tests.cluster.pods import Pod


def may_evict(
    pod: Pod, budgets: Iterable[dict[str, Any]], pods: Sequence[Pod], deployments: Sequence[Deployment]
) -> bool:
    """
    Args:
        budgets: PodDisruptionBudgets of the namespace. pods, deployments: likewise.
    """
    return all(_allows(budget["spec"], pod, pods, deployments) for budget in budgets if selects(budget, pod))


def selects(manifest: dict[str, Any], pod: Pod) -> bool:
    """Whether a manifest's `matchLabels`, or a Service's selector, are among the pod's labels."""
    selector = manifest["spec"]["selector"]
    return bool(selector.get("matchLabels", selector).items() <= pod.labels.items())


def _allows(spec: dict[str, Any], pod: Pod, pods: Sequence[Pod], deployments: Sequence[Deployment]) -> bool:
    if not pod.ready and spec.get("unhealthyPodEvictionPolicy") == "AlwaysAllow":
        return True
    chosen = [each for each in pods if selects({"spec": spec}, each)]
    owners = {each.owner.rpartition("-")[0] for each in chosen}
    expected = sum(each.replicas for each in deployments if each.name in owners)
    if "minAvailable" in spec:
        least = of_percentage(spec["minAvailable"], expected, up=True)
    else:
        least = expected - of_percentage(spec["maxUnavailable"], expected, up=True)
    return sum(each.is_available for each in chosen) > least
