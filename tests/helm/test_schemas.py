"""Everything that is rendered is valid for Kubernetes, old and new, and for the operators whose resources are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.rendering import VALUES, Manifest, of_kind, pod_templates, render, rendered

NEWEST = "1.37"
# Chart.yaml's kubeVersion; ResourceClaims became stable later.
OLDEST = {name: "1.34" if name == "resource-claim" else "1.30" for name in VALUES}
CUSTOM = {
    schema["properties"]["kind"]["const"]: schema
    for schema in map(yaml.safe_load, (file.read_text() for file in Path(__file__).parent.glob("schemas/*.yaml")))
}


def validate(manifest: Manifest, version: str) -> None:
    """Raises where the manifest is not valid, and where there is no schema for it."""
    if schema := CUSTOM.get(manifest["kind"]):
        jsonschema.Draft202012Validator(schema).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("values", VALUES)
def test_objects_are_valid(values: str) -> None:
    for manifest in rendered(values):
        for version in (OLDEST[values], NEWEST):
            validate(manifest, version)


@pytest.mark.parametrize("version", [OLDEST["rayservice"], NEWEST])
def test_pod_templates_of_a_rayservice_are_valid(version: str) -> None:
    for pod in pod_templates(rendered("rayservice")):
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": pod.metadata | {"name": pod.name}, "spec": pod.spec}
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_kind_that_the_chart_can_make_is_rendered_here() -> None:
    kinds = {manifest["kind"] for name in VALUES for manifest in rendered(name)}
    assert kinds >= {
        *("ConfigMap", "Deployment", "StatefulSet", "Service", "ServiceAccount", "Role", "RoleBinding"),
        *("PersistentVolumeClaim", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy", "ResourceClaim"),
        *(
            "ScaledObject",
            "ServiceMonitor",
            "PodMonitor",
            "PrometheusRule",
            "RayService",
            "Ingress",
            "HTTPRoute",
            "Job",
            "Pod",
        ),
    }


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("ScaledObject", "keda"),
        ("ServiceMonitor", "tls"),
        ("RayService", "rayservice"),
        ("PodMonitor", "rayservice"),
        ("HTTPRoute", "extras"),
    ],
)
def test_a_misspelt_field_of_a_custom_resource_is_seen(kind: str, values: str) -> None:
    for manifest in of_kind(rendered(values), kind).values():
        validate(manifest, NEWEST)
        with pytest.raises(jsonschema.ValidationError, match="extra"):
            validate(manifest | {"spec": manifest["spec"] | {"extra": 1}}, NEWEST)


def test_a_misspelt_field_of_kubernetes_is_seen() -> None:
    values: dict[str, Any] = {"model": "m", "podSecurityContext": {"runAsNonRoots": True}}
    with pytest.raises(kubernetes_validate.ValidationError, match="runAsNonRoots"):
        for manifest in render(values):
            validate(manifest, NEWEST)
