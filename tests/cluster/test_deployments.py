"""Rolling updates and evictions, with pods that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.deployments import Deployment
from tests.cluster.disruptions import may_evict
from tests.cluster.pods import Pod
from tests.cluster.services import endpoint_slice, ready_addresses

LABELS = {"app": "encoder"}


def manifest(replicas: int, image: str = "first", **rolling: Any) -> dict[str, Any]:
    container = {"name": "encoder", "image": image, "ports": [{"name": "grpc", "containerPort": 50051}]}
    return {
        "metadata": {"name": "encoder"},
        "spec": {
            "replicas": replicas,
            "strategy": {"rollingUpdate": rolling},
            "template": {"metadata": {"labels": LABELS}, "spec": {"containers": [container]}},
        },
    }


class Namespace:
    """One Deployment whose pods are ready, and gone, in the step after that in which it starts or ends them."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.pods: list[Pod] = []
        self.num_started = 0
        self.starts_well = True
        self.counts: list[tuple[int, int]] = []

    def step(self) -> None:
        self.pods = [pod for pod in self.pods if not pod.terminating]
        for pod in self.pods:
            pod.ready = pod.ready or self.starts_well
        self.deployment.reconcile(self.pods)
        for replica_set in self.deployment.missing(self.pods):
            self.num_started += 1
            name, template = f"{replica_set}-{self.num_started}", self.deployment.template(replica_set)
            address = f"127.0.0.{self.num_started}"
            pod = Pod(name, replica_set, "node", address, **template, created=float(self.num_started))
            self.pods.append(pod)
        num_active = sum(not pod.terminating for pod in self.pods)
        for pod in self.deployment.surplus(self.pods):
            pod.terminating = True
        self.counts.append((sum(pod.is_available for pod in self.pods), num_active))

    def settle(self) -> tuple[int, int]:
        """Returns the least number of available pods and the largest number of all that there were."""
        self.counts.clear()
        for _ in range(40):
            self.step()
        available, active = zip(*self.counts, strict=True)
        return min(available), max(active)


def installed(replicas: int, **rolling: Any) -> Namespace:
    namespace = Namespace(Deployment(manifest(replicas, **rolling)))
    namespace.settle()
    assert namespace.deployment.is_settled(namespace.pods)
    return namespace


@pytest.mark.parametrize(
    ("replicas", "rolling", "least", "most"),
    [
        (1, {}, 1, 2),
        (4, {}, 3, 5),
        (2, {"maxSurge": 0, "maxUnavailable": 1}, 1, 2),
        (3, {"maxSurge": 2, "maxUnavailable": 0}, 3, 5),
        (10, {"maxSurge": "30%", "maxUnavailable": "15%"}, 9, 13),
    ],
)
def test_an_update_keeps_within_its_bounds(replicas: int, rolling: dict[str, Any], least: int, most: int) -> None:
    namespace = installed(replicas, **rolling)
    for image in ("second", "first"):  # and back
        started = namespace.num_started
        namespace.deployment.apply(manifest(replicas, image, **rolling))
        assert namespace.settle() == (least, most)
        assert namespace.deployment.is_settled(namespace.pods)
        assert namespace.num_started == started + replicas
        assert {pod.spec["containers"][0]["image"] for pod in namespace.pods} == {image}


def test_pods_that_do_not_start_replace_none_and_go_with_a_rollback() -> None:
    namespace = installed(3)
    first = list(namespace.pods)
    namespace.starts_well = False
    namespace.deployment.apply(manifest(3, "broken"))
    assert namespace.settle() == (3, 4)
    assert not namespace.deployment.is_settled(namespace.pods)
    namespace.deployment.apply(manifest(3))
    namespace.settle()
    assert namespace.pods == first


def test_scaling_down_ends_the_newest() -> None:
    namespace = installed(3)
    oldest = namespace.pods[0]
    namespace.deployment.apply(manifest(1))
    namespace.settle()
    assert namespace.pods == [oldest]


@pytest.mark.parametrize(
    ("budget", "replicas", "num_evicted"),
    [
        ({"maxUnavailable": 1}, 3, 1),
        ({"maxUnavailable": "50%"}, 3, 2),
        ({"maxUnavailable": 0}, 3, 0),
        ({"minAvailable": 1}, 3, 2),
        ({"minAvailable": "60%"}, 3, 1),
    ],
)
def test_a_budget_bounds_evictions(budget: dict[str, Any], replicas: int, num_evicted: int) -> None:
    namespace = installed(replicas)
    budgets = [{"spec": budget | {"selector": {"matchLabels": LABELS}}}]
    for pod in namespace.pods:
        pod.terminating = may_evict(pod, budgets, namespace.pods, [namespace.deployment])
    assert sum(pod.terminating for pod in namespace.pods) == num_evicted


def test_pods_that_are_not_ready_are_evicted_if_the_budget_says_so() -> None:
    namespace = installed(2)
    pod = namespace.pods[0]
    pod.ready = False
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": LABELS}}
    others = (namespace.pods, [namespace.deployment])
    assert not may_evict(pod, [{"spec": spec}], *others)
    assert may_evict(pod, [{"spec": spec | {"unhealthyPodEvictionPolicy": "AlwaysAllow"}}], *others)
    assert may_evict(pod, [{"spec": spec | {"selector": {"matchLabels": {"app": "llm"}}}}], *others)


def test_endpoints_are_the_ready_pods() -> None:
    namespace = installed(3)
    namespace.pods[0].ready = False
    namespace.pods[1].terminating = True
    service = {"spec": {"selector": LABELS, "ports": [{"name": "grpc", "port": 1, "targetPort": "grpc"}]}}
    found = endpoint_slice(service, namespace.pods)
    assert found["ports"] == [{"name": "grpc", "port": 50051}]
    assert [each["conditions"]["serving"] for each in found["endpoints"]] == [False, True, True]
    assert ready_addresses([found]) == ["127.0.0.3"]
