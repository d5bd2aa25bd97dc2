"""Scraping, rules and dashboards."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from tests.helm.rendering import (
    CHART,
    Manifest,
    of_kind,
    pods,
    pods_selected,
    render,
    rendered,
    values_of,
    with_registry,
)
from tests.helm.test_config import config_files
from tests.helm.test_schemas import NEWEST, validate
from vitrine_vlm.deploy.ray_serve.gateway import METRICS
from vitrine_vlm.deploy.ray_serve.metrics_targets import ENCODER_JOB, LLM_JOB

SOURCES = CHART.parents[1] / "deploy" / "observability"


@pytest.mark.parametrize(
    "values", ["locked-down", "tls", "server-tls", "vllm", "vllm-own-tower", "sglang", "keys", "vllm-keys"]
)
def test_every_pod_is_scraped_once(values: str) -> None:
    manifests = rendered(values)
    scraped: list[str] = []
    for monitor in of_kind(manifests, "ServiceMonitor").values():
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (endpoint,) = monitor["spec"]["endpoints"]
        for service in of_kind(manifests, "Service").values():
            if wanted <= service["metadata"]["labels"].items():
                assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
                scraped += pods_selected(service["spec"]["selector"], manifests)
    assert sorted(scraped) == sorted(pods(values))


def test_prometheus_finds_the_monitors() -> None:
    for monitor in of_kind(rendered("locked-down"), "ServiceMonitor").values():
        assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_metrics_of_workers_are_scraped_with_tls_where_they_serve_with_it() -> None:
    (endpoint,) = of_kind(rendered("locked-down"), "ServiceMonitor")["demo-vitrine-llm"]["spec"]["endpoints"]
    assert "scheme" not in endpoint
    for values, names in (("server-tls", {"serverName", "ca"}), ("tls", {"serverName", "ca", "cert", "keySecret"})):
        (endpoint,) = of_kind(rendered(values), "ServiceMonitor")["demo-vitrine-llm"]["spec"]["endpoints"]
        assert endpoint["scheme"] == "https"
        assert endpoint["tlsConfig"].keys() == names
        assert endpoint["tlsConfig"]["serverName"] == "demo-vitrine-llm.serving.svc"


def test_metrics_of_encoders_are_scraped_with_the_name_in_their_certificate() -> None:
    (endpoint,) = of_kind(rendered("tls"), "ServiceMonitor")["demo-vitrine-encoder"]["spec"]["endpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]["serverName"]) == ("https", "encoders.vitrine")
    for part in (endpoint["tlsConfig"]["ca"], endpoint["tlsConfig"]["cert"]):
        assert part["secret"]["name"] == "encoder-tls"


def test_without_the_operator_nothing_of_it_is_made() -> None:
    assert not of_kind(rendered("default"), "ServiceMonitor", "PodMonitor")


def test_rays_pods_are_scraped() -> None:
    """KubeRay gives each container of Ray a port "metrics"."""
    monitor = of_kind(rendered("rayservice"), "PodMonitor")["demo-vitrine-ray"]
    assert [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    selected = pods_selected(monitor["spec"]["selector"]["matchLabels"], rendered("rayservice"))
    assert selected == pods("rayservice").keys()


def test_metrics_of_rays_replicas_are_scraped_at_one_door() -> None:
    """Every door has those of all replicas, which are kept apart by the labels that the door gives them."""
    manifests = rendered("rayservice")
    spec = of_kind(manifests, "PodMonitor")["demo-vitrine-ray-door"]["spec"]
    assert pods_selected(spec["selector"]["matchLabels"], manifests) == {"demo-vitrine-head"}
    (head,) = [pod for pod in pods("rayservice").values() if pod.name.endswith("-head")]
    endpoints = spec["podMetricsEndpoints"]
    assert [each["params"]["job"] for each in endpoints] == [[ENCODER_JOB], [LLM_JOB]]
    for each in endpoints:
        assert each["port"] in [port["name"] for port in head.container["ports"] if port["containerPort"] == 8000]
        assert (each["path"], each["honorLabels"]) == (METRICS, True)
        assert "authorization" not in each


def test_prometheus_has_a_key_where_rays_door_needs_one() -> None:
    monitor = {"enabled": True, "apiKeySecretName": "prometheus-key", "apiKeySecretKey": "token"}
    keys = {"accessKeys": {"secretName": "api-keys"}, "monitoring": {"serviceMonitor": monitor}}
    made = of_kind(render({"model": "m", "mode": "rayservice"} | keys), "PodMonitor")["demo-vitrine-ray-door"]
    validate(made, NEWEST)
    for each in made["spec"]["podMetricsEndpoints"]:
        assert each["authorization"] == {"credentials": {"name": "prometheus-key", "key": "token"}}


@pytest.mark.parametrize(
    ("release", "values"),
    [
        ("demo", {}),
        ("vitrine", {}),
        ("demo", {"nameOverride": "eyes"}),
        ("demo", {"fullnameOverride": "vision"}),
        ("a-release-whose-name-is-so-long-that-it-is-cut", {}),
        ("demo", {"fullnameOverride": "vision", "mode": "rayservice"}),
    ],
)
def test_alerts_know_the_jobs_by_their_names(release: str, values: dict[str, Any]) -> None:
    """An alert that looks for a job of another name would fire for ever, or never."""
    given = {"model": "m", "monitoring": {"serviceMonitor": {"enabled": True}}} | values
    jobs = set()
    for monitor in of_kind(render(given, release), "ServiceMonitor", "PodMonitor").values():
        spec = monitor["spec"]
        for endpoint in spec.get("endpoints", []) + spec.get("podMetricsEndpoints", []):
            jobs |= {each["replacement"] for each in endpoint.get("relabelings", []) if each["targetLabel"] == "job"}
    rules = (SOURCES / "rules" / "vitrine.yaml").read_text()
    patterns = set(re.findall(r'up\{job=~"([^"]+)"\}', rules))
    assert len(jobs) == 2 and len(patterns) == 2
    found = {pattern: sum(bool(re.fullmatch(pattern, job)) for job in jobs) for pattern in patterns}
    assert found == {".*vitrine.*": 2, ".*vitrine.*llm.*": 1}


def test_ports_of_metrics_are_those_of_the_settings() -> None:
    for name, pod in pods("default").items():
        config = config_files(rendered("default"))[name]
        ports = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        if "-encoder-" in name:
            assert ports == {"grpc": config["port"], "metrics": config["metrics_port"]}
        else:
            assert ports == {"http": config["port"], "grpc": config["grpc_port"]}


class TestFiles:
    """With dashboards and rules in the chart's folder."""

    DASHBOARD = '{"title": "{{ not a template }}", "panels": []}\n'
    RULE: Manifest = {"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }} is down"}}  # noqa: RUF012

    @pytest.fixture
    def manifests(self, tmp_path: Path) -> list[Manifest]:
        chart = tmp_path / "vitrine"
        shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("dashboards", "rules"))
        (chart / "files" / "dashboards").mkdir()
        (chart / "files" / "dashboards" / "vitrine.json").write_text(self.DASHBOARD)
        (chart / "files" / "rules").mkdir()
        (chart / "files" / "rules" / "vitrine.yaml").write_text(
            yaml.safe_dump({"groups": [{"name": "g", "rules": [self.RULE]}]})
        )
        files = Chart.load(chart).render(with_registry(values_of("locked-down")), name="demo", namespace="serving")
        return [each for each in yaml.safe_load_all(files["vitrine/templates/monitoring.yaml"]) if each]

    def test_rules_are_those_of_the_file(self, manifests: list[Manifest]) -> None:
        (rule,) = of_kind(manifests, "PrometheusRule").values()
        validate(rule, NEWEST)
        assert rule["spec"]["groups"][0]["rules"] == [self.RULE]
        assert rule["metadata"]["labels"]["release"] == "prometheus"

    def test_grafanas_sidecar_finds_the_dashboard(self, manifests: list[Manifest]) -> None:
        (config,) = of_kind(manifests, "ConfigMap").values()
        validate(config, NEWEST)
        assert config["data"] == {"vitrine.json": self.DASHBOARD}
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_runbooks_are_where_the_operator_shows_them() -> None:
    shown = "https://git.example/docs/operations.md"
    rules = {"enabled": True, "runbookUrl": shown}
    (made,) = of_kind(render({"model": "m", "monitoring": {"prometheusRule": rules}}), "PrometheusRule").values()
    alerts = [rule for group in made["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"{shown}#{alert['alert'].lower()}"


def _groups(file: Path) -> Any:
    return yaml.safe_load(file.read_text()).get("groups")


def test_the_charts_copies_of_dashboards_and_rules_are_up_to_date() -> None:
    """A chart cannot read outside of its folder."""
    dashboards = {file.name: file.read_bytes() for file in SOURCES.glob("grafana/**/*.json")}
    rules = {file.name: file.read_bytes() for file in SOURCES.glob("rules/*.yaml") if _groups(file)}
    copies = [
        {file.name: file.read_bytes() for file in (CHART / "files" / kind).glob("*")}
        for kind in ("dashboards", "rules")
    ]
    assert copies == [dashboards, rules]
