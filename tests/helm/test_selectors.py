"""Deployments, Services and disruption budgets select the pods that they are for."""

from __future__ import annotations

import pytest

from tests.helm.rendering import VALUES, of_kind, pod_templates, pods_of, pods_selected, render, rendered

WITH_PODS_OF_OURS = sorted(VALUES.keys() - {"rayservice"})


@pytest.mark.parametrize("values", WITH_PODS_OF_OURS)
def test_selectors_of_a_deployment_are_its_own_pods(values: str) -> None:
    manifests = rendered(values)
    for name, deployment in of_kind(manifests, "Deployment", "StatefulSet").items():
        assert pods_selected(deployment["spec"]["selector"]["matchLabels"], manifests) == {name}


@pytest.mark.parametrize("values", WITH_PODS_OF_OURS)
def test_selectors_of_services_are_pods_with_these_ports(values: str) -> None:
    manifests = rendered(values)
    containers = {pod.name: pod.container for pod in pod_templates(manifests)}
    for name, service in of_kind(manifests, "Service").items():
        selected = pods_selected(service["spec"]["selector"], manifests)
        assert selected
        if (pool := name.removesuffix("-metrics")) in containers:  # of one pool
            assert selected == {pool}
        else:
            others = of_kind(manifests, "Service").keys()
            assert selected == {pod for pod in containers if "-llm-" in pod and pod not in others}
        for pod in selected:
            ports = {port["name"] for port in containers[pod]["ports"]}
            targets = {port["targetPort"] for port in service["spec"]["ports"]}
            if name.endswith("-metrics"):
                assert targets == {"metrics"} < ports
            elif service["spec"].get("clusterIP") == "None":
                assert targets == ports
            else:  # Users of other engines, and of the gateway, have HTTP alone; metrics are for none of them.
                assert targets == ({"http", "grpc"} if pods_of(manifests)[pod].program == "llm" else {"http"})


@pytest.mark.parametrize("values", WITH_PODS_OF_OURS)
def test_selectors_of_disruption_budgets_are_one_pool(values: str) -> None:
    manifests = rendered(values)
    for name, budget in of_kind(manifests, "PodDisruptionBudget").items():
        assert pods_selected(budget["spec"]["selector"]["matchLabels"], manifests) == {name}


def test_every_pool_has_a_budget_unless_it_wants_none() -> None:
    manifests = rendered("pools")
    budgets = of_kind(manifests, "PodDisruptionBudget")
    assert budgets.keys() == of_kind(manifests, "Deployment").keys() - {"demo-vitrine-encoder-slices"}
    assert budgets["demo-vitrine-llm-short"]["spec"]["maxUnavailable"] == "50%"


def test_selectors_of_releases_do_not_meet() -> None:
    other = render({"model": "m"}, release="other")
    for service in of_kind(rendered("default"), "Service").values():
        assert not pods_selected(service["spec"]["selector"], other)


def test_encoders_have_headless_services() -> None:
    services = of_kind(rendered("pools"), "Service")
    headless = {name for name, each in services.items() if each["spec"].get("clusterIP") == "None"}
    assert headless == services.keys() - {"demo-vitrine-llm"}
    assert services["demo-vitrine-llm"]["spec"]["type"] == "LoadBalancer"
    assert services["demo-vitrine-llm"]["metadata"]["annotations"] == {"example.com/internal": "true"}
