"""ServiceAccounts and what they may do."""

from __future__ import annotations

import pytest

from tests.helm.rendering import NAMESPACE, VALUES, of_kind, pod_templates, rendered


@pytest.mark.parametrize("values", VALUES)
def test_pods_use_accounts_that_are_made(values: str) -> None:
    accounts = of_kind(rendered(values), "ServiceAccount")
    used = {pod.spec["serviceAccountName"] for pod in pod_templates(rendered(values))}
    assert used - {"theirs"} == accounts.keys()
    for account in accounts.values():
        assert account["automountServiceAccountToken"] is False


def test_workers_may_read_endpoint_slices_and_nothing_else() -> None:
    manifests = rendered("default")
    (role,) = of_kind(manifests, "Role").values()
    (binding,) = of_kind(manifests, "RoleBinding").values()
    (rule,) = role["rules"]
    assert rule == {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    (worker,) = (pod for pod in pod_templates(manifests) if "-llm-" in pod.name)
    assert (subject["name"], subject["namespace"]) == (worker.spec["serviceAccountName"], NAMESPACE)


@pytest.mark.parametrize("values", ["pools", "rayservice"])
def test_nobody_asks_the_api_server_without_need(values: str) -> None:
    assert not of_kind(rendered(values), "Role")


def test_names_and_annotations_can_be_given() -> None:
    (account,) = of_kind(rendered("cpu"), "ServiceAccount").values()
    assert account["metadata"]["name"] == "workers"
    assert account["metadata"]["annotations"] == {"example.com/role": "reader"}
