"""The dashboard against what the services export, and its layout. Grafana itself is not run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.docker.tools import check
from tests.deploy.observability.exported import exported, problems
from tests.deploy.observability.test_rules import FOLDER, RECORDED, promtool

DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana/vitrine.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
CHARTS = [panel for panel in PANELS if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in CHARTS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
_WIDTH = 24


@pytest.mark.parametrize("panel", CHARTS, ids=lambda panel: str(panel["title"]))
def test_a_panel_asks_for_what_is_exported_and_says_what_it_shows(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        assert problems(target["expr"], RECORDED) == []
        assert target["datasource"]["uid"] == "${datasource}"
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= {
            "pod",
            *(label for name in re.findall(r"vitrine_\w+", target["expr"]) for label in exported()[name].values),
        }
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["description"].endswith(".")


def test_promql_is_valid(tmp_path: Path) -> None:
    filled_in = [re.sub(r"\$\w+", "x", each.replace("$__rate_interval", "5m")) for each in EXPRESSIONS]
    rules = [{"record": f"dashboard:{number}", "expr": each} for number, each in enumerate(filled_in)]
    file = tmp_path / "dashboard.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    check(promtool(), "check", "rules", str(file))


def test_panels_have_ids_and_titles_of_their_own() -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in PANELS]
        assert sorted(set(values)) == sorted(values)


def test_panels_do_not_overlap_and_leave_no_gap() -> None:
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in PANELS)
        for column, line in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert {column for column, _ in cells} == set(range(_WIDTH))
    assert len(cells) == _WIDTH * (1 + max(line for _, line in cells))


def test_variables_are_used_and_defined() -> None:
    used = set(re.findall(r"\$\{?(\w+)\}?", (FOLDER / "grafana/vitrine.json").read_text()))
    assert used - {"__rate_interval", "__all"} == set(VARIABLES)
    assert VARIABLES["datasource"]["type"] == "datasource"
    for variable in DASHBOARD["templating"]["list"][1:]:
        # Where targets have no such label, as namespace outside Kubernetes, everything must be shown.
        assert variable["allValue"] == ".*"
        assert problems(variable["definition"], RECORDED) == []


def test_it_shows_every_metric() -> None:
    left_out = {
        "vitrine_build_info",  # does not change
        "vitrine_encoder_admitted_patches",  # what the queue's seconds are made from
        "vitrine_encoder_queue_patches",
        "vitrine_encoder_held_media_bytes",  # far from its bound but for very large media
        "vitrine_encoder_tickets_live",  # only where layouts are asked for alone
        "vitrine_encoder_ticket_bytes",
        "vitrine_encoder_ahead_tickets",
        "vitrine_encoder_sglang_parts",  # only beside SGLang
        "vitrine_encoder_sglang_bytes",
        "vitrine_encoder_cache_evictions",  # seen in the cache's size and hits
        "vitrine_encoder_cuda_graphs",  # does not change
        "vitrine_llm_unused_fields",  # names of fields, for the question why one does nothing
        "vitrine_llm_kv_hand_over_seconds",  # only where prefill and decode are apart
    }
    shown = {_metric(name) for each in EXPRESSIONS for name in re.findall(r"vitrine_\w+", each)}
    assert {_metric(name) for name in exported()} - shown == left_out


def _metric(series: str) -> str:
    return re.sub(r"_(bucket|count|sum|created|total)$", "", series)


def test_grafana_finds_it() -> None:
    provisioning = FOLDER / "grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == VARIABLES["datasource"]["query"]
    [provider] = yaml.safe_load((provisioning / "dashboards/vitrine.yaml").read_text())["providers"]
    compose = yaml.safe_load((FOLDER / "../docker/compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    assert (
        f"../observability/grafana/vitrine.json:{provider['options']['path']}/vitrine.json:ro"
        in compose["grafana"]["volumes"]
    )
