"""What is added to pods, Services and the release as a whole; ways in from outside of the cluster."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmRenderError

from tests.helm.rendering import of_kind, pods, render, rendered, values_of

EVERYWHERE = pytest.mark.parametrize("values", ["extras", "rayservice"])


@EVERYWHERE
def test_pods_have_what_is_added_to_them(values: str) -> None:
    for pod in pods(values).values():
        assert [each["name"] for each in pod.spec["initContainers"]] == ["first"]
        assert [each["name"] for each in pod.spec["containers"][1:]] == ["beside"]
        assert pod.container["envFrom"] == [{"secretRef": {"name": "proxy"}}]
        assert pod.spec["schedulerName"] == "gang"
        assert pod.spec["hostAliases"] == [{"ip": "10.0.0.1", "hostnames": ["hub.internal"]}]
        assert pod.spec["dnsConfig"] == {"options": [{"name": "ndots", "value": "1"}]}


def test_rays_pods_have_what_other_pods_have() -> None:
    for pod in pods("rayservice").values():
        assert pod.spec["priorityClassName"] == "serving"
        assert pod.spec["runtimeClassName"] == "nvidia"
        assert pod.spec["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname"
        assert pod.metadata["labels"]["tier"] == "serving"
        assert pod.metadata["annotations"] == {"note": "Ray"}
        assert {"name": "data", "mountPath": "/data"} in pod.container["volumeMounts"]
        assert {"name": "data", "emptyDir": {}} in pod.spec["volumes"]


@EVERYWHERE
def test_labels_of_all_objects_and_pods(values: str) -> None:
    for each in rendered(values):
        if not each["metadata"]["name"].startswith("demo-extra") and each["kind"] != "Secret":
            assert each["metadata"]["labels"]["team"] == "vision", each["metadata"]["name"]
            assert "team" not in each.get("spec", {}).get("selector", {}).get("matchLabels", {})
    for pod in pods(values).values():
        assert pod.metadata["labels"]["team"] == "vision"


def test_objects_of_ones_own_may_be_templates() -> None:
    assert "demo-extra" in of_kind(rendered("extras"), "ConfigMap")
    assert of_kind(rendered("extras"), "Secret").keys() == {"demo-text"}


def test_budgets_and_histories() -> None:
    for budget in of_kind(rendered("extras"), "PodDisruptionBudget").values():
        assert budget["spec"]["minAvailable"] == "50%"
        assert "maxUnavailable" not in budget["spec"]
    for deployment in of_kind(rendered("extras"), "Deployment").values():
        assert deployment["spec"]["revisionHistoryLimit"] == 2
    none = render({"model": "m", "encoders": {"defaults": {"podDisruptionBudget": {"minAvailable": 0}}}})
    assert of_kind(none, "PodDisruptionBudget")["demo-vitrine-encoder-default"]["spec"]["minAvailable"] == 0


class TestWaysIn:
    """Service, Ingress and HTTPRoute."""

    def test_the_service_that_users_call(self) -> None:
        spec = of_kind(rendered("extras"), "Service")["demo-vitrine-llm"]["spec"]
        assert spec["loadBalancerClass"] == "example.com/lb"
        assert spec["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
        assert spec["externalTrafficPolicy"] == "Local"
        ports = {each["name"]: each for each in spec["ports"]}
        assert ports["http"]["nodePort"] == 30080
        assert "nodePort" not in ports["grpc"]

    def test_all_services_have_the_ip_families(self) -> None:
        for service in of_kind(rendered("extras"), "Service").values():
            assert service["spec"]["ipFamilyPolicy"] == "PreferDualStack"
            assert service["spec"]["ipFamilies"] == ["IPv6", "IPv4"]

    def test_an_ingress(self) -> None:
        (ingress,) = of_kind(rendered("extras"), "Ingress").values()
        assert ingress["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/proxy-read-timeout": "600"}
        spec = ingress["spec"]
        assert (spec["ingressClassName"], spec["tls"][0]["secretName"]) == ("nginx", "vision")
        (rule,) = spec["rules"]
        assert rule["host"] == "vision.example.com"
        (path,) = rule["http"]["paths"]
        assert (path["path"], path["backend"]["service"]["port"]) == ("/", {"number": 8000})
        (rule,) = next(iter(of_kind(self.routed("default"), "Ingress").values()))["spec"]["rules"]
        assert "host" not in rule

    def test_an_http_route(self) -> None:
        (route,) = of_kind(rendered("extras"), "HTTPRoute").values()
        assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
        assert route["spec"]["hostnames"] == ["vision.example.com"]
        assert route["spec"]["rules"][0]["timeouts"] == {"request": "600s"}
        with pytest.raises(HelmRenderError, match=r"httpRoute\.parentRefs is required"):
            render({"model": "m", "httpRoute": {"enabled": True}})

    @pytest.mark.parametrize(
        ("values", "service"),
        [("default", "demo-vitrine-llm"), ("vllm", "demo-vitrine-gateway"), ("rayservice", "demo-vitrine-serve-svc")],
    )
    def test_both_go_to_what_users_call(self, values: str, service: str) -> None:
        manifests = self.routed(values)
        (ingress,) = of_kind(manifests, "Ingress").values()
        (route,) = of_kind(manifests, "HTTPRoute").values()
        (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"]["name"] == service
        assert route["spec"]["rules"][0]["backendRefs"] == [{"name": service, "port": 8000}]
        assert values == "rayservice" or service in of_kind(manifests, "Service")

    def routed(self, values: str) -> list[dict[str, Any]]:
        ways = {"ingress": {"enabled": True}, "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}}
        return render(values_of(values) | ways)
