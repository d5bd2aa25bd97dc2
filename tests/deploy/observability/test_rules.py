"""The rules against what the services export, and by promtool's own tests where there is a promtool."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.docker.tools import check, find_tool
from tests.deploy.observability.exported import problems
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.llm_worker.config import LlmConfig

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy/observability"
RULES_FILE, TESTS_FILE = FOLDER / "rules/vitrine.yaml", FOLDER / "rules/tests.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
EACH_ALERT = pytest.mark.parametrize("alert", ALERTS.values(), ids=list(ALERTS))


def promtool() -> str:
    return os.environ.get("PROMTOOL") or find_tool(
        "promtool", "Debian's package prometheus or promtool; or set PROMTOOL"
    )


def test_promtool_accepts_rules_and_configuration() -> None:
    check(promtool(), "check", "rules", str(RULES_FILE))
    check(promtool(), "check", "config", str(FOLDER / "prometheus.yml"))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    check(promtool(), "test", "rules", str(TESTS_FILE))


def test_every_alert_has_a_test() -> None:
    tested = set(re.findall(r"\bVitrine\w+", TESTS_FILE.read_text()))
    assert tested == set(ALERTS)


def test_no_name_is_used_twice() -> None:
    names = [rule.get("alert") or rule["record"] for rule in RULES]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.get("alert") or rule["record"]))
def test_it_asks_for_what_is_exported(rule: dict[str, Any]) -> None:
    assert problems(rule["expr"], RECORDED) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(vitrine_llm_typo_total[5m])", "vitrine_llm_typo_total is not exported"),
        ("rate(vitrine_llm_preemptions[5m])", "vitrine_llm_preemptions is not exported"),
        ("pod:vitrine_llm_waiting:sum > 1", "pod:vitrine_llm_waiting:sum is not recorded"),
        ('vitrine_encoder_leases_total{end="expired"}', "vitrine_encoder_leases_total has no label end"),
        ('vitrine_encoder_leases_total{event="late"}', "vitrine_encoder_leases_total: event is never late"),
        ('vitrine_llm_requests_total{outcome=~"ok|fine"}', "vitrine_llm_requests_total: outcome is never fine"),
    ],
)
def test_a_mistake_in_an_expression_is_found(expression: str, problem: str) -> None:
    assert problems(expression, RECORDED) == [problem]


@EACH_ALERT
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert len(alert["annotations"]["summary"]) < 100
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"


@EACH_ALERT
def test_the_runbook_has_a_section_on_it(alert: dict[str, Any]) -> None:
    runbook = ROOT / "docs/operations.md"
    if not runbook.exists():
        pytest.skip("docs/operations.md is not written yet")
    headings = re.findall(r"^#+ +(.+)$", runbook.read_text(), flags=re.MULTILINE)
    assert alert["alert"] in {heading.strip("` ") for heading in headings}


def test_settings_named_in_alerts_exist() -> None:
    texts = " ".join(alert["annotations"]["description"] for alert in ALERTS.values())
    words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", re.sub(r"vitrine_\w+", "", texts)))
    outcomes = {"encoder_unavailable", "encoder_mismatch", "transport_unavailable", "internal_error"}
    assert words - outcomes <= {*EncoderConfig.model_fields, *LlmConfig.model_fields}
