"""Values: pools are merged with the defaults, typos fail, and the documentation is that of the values."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart, HelmRenderError, HelmValuesError, lint

from tests.helm.rendering import CHART, VALUES, notes, of_kind, render, rendered, values_of, with_registry


def test_a_pool_that_is_null_is_not_there() -> None:
    deployments = of_kind(rendered("pools"), "Deployment").keys()
    assert deployments == {
        *("demo-vitrine-encoder-default", "demo-vitrine-encoder-slices"),
        *("demo-vitrine-llm-short", "demo-vitrine-llm-long"),
    }


def test_there_must_be_a_pool() -> None:
    with pytest.raises(HelmRenderError, match=r"there is no encoder pool: fill encoders\.pools"):
        render({"model": "m", "encoders": {"pools": {"default": None}}})


def test_workers_name_pools_that_are_there() -> None:
    with pytest.raises(HelmRenderError, match=r'llm\.pools\.default\.encoderPools names "fast".*only default'):
        render({"model": "m", "llm": {"pools": {"default": {"encoderPools": ["fast"]}}}})


@pytest.mark.parametrize(
    "values",
    [
        {"modell": "m"},
        {"encoder": {}},
        {"encoders": {"pool": {}}},
        {"encoders": {"defaults": {"replica": 2}}},
        {"llm": {"pools": {"default": {"gpus": 1}}}},
        {"llm": {"pools": {"Large": {}}}},
        {"llm": {"pools": {"a-name-of-more-than-20": {}}}},
        {"encoders": {"defaults": {"autoscaling": {"kind": "vpa"}}}},
        {"encoders": {"defaults": {"autoscaling": {"minReplicas": -1}}}},
        {"encoders": {"pools": {"default": {"encoderPools": ["default"]}}}},
        {"llm": {"defaults": {"config": {"max-items": 1}}}},
        {"encoders": {"defaults": {"resources": {"limit": {}}}}},
        {"encoders": {"defaults": {"resources": {"limits": {"memory": "24 GB"}}}}},
        {"encoders": {"defaults": {"cudaVisibleDevices": "all"}}},
        {"mode": "ray"},
        {"discovery": "etcd"},
        {"colocation": {"gpuSharing": "mps"}},
        {"colocation": {"gpuSharing": "runtimeClass"}},
        {"colocation": {"sharedMemoryHostPath": "/dev/shm/vitrine"}},
        {"colocation": {"enabled": True, "sharedMemoryHostPath": "shm"}},
        {"modelCache": {"kind": "pvc"}},
        {"tls": {"encoders": {"clientAuth": True}}},
        {"tls": {"llm": {"clientAuth": True}}},
        {"tls": {"secretName": "s"}},
        {"log": {"level": "trace"}},
        {"networkPolicy": {"client": []}},
        {"ray": {"worker": {}}},
        {"monitoring": {"serviceMonitor": {"enabled": "yes"}}},
        {"engine": "tgi"},
        {"vllm": {"mode": "m"}},
        {"sglang": {"version": "latest"}},
        {"sglang": {"receivers": "10.0.0.0/8"}},
        {"gateway": {"gpu": {"count": 1}}},
        {"accessKeys": {"secretName": "My_Keys"}},
        {"llm": {"defaults": {"priorityClassName": "High"}}},
        {"llm": {"defaults": {"podLabels": {"team": "a b"}}}},
        {"encoders": {"defaults": {"nodeSelector": {"-gpu": "x"}}}},
        {"images": {"pullSecrets": ["a_b"]}},
    ],
)
def test_misspelt_values_fail(values: dict[str, Any]) -> None:
    with pytest.raises(HelmValuesError, match="don't meet the specifications of the schema"):
        render({"model": "m"} | values)


def test_a_model_must_be_named() -> None:
    with pytest.raises(HelmRenderError, match="model is required, for example --set model="):
        render({})


def test_the_schema_knows_every_value() -> None:
    """And has a default for each, but for those within free-form maps."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = [path for path in _paths_of_schema(schema, schema) if not _has(values, path)]
    # `global` is Helm's own, for charts that include this one; the others are of workers alone.
    of_workers = ("role", "encoderPools", "prefillPools", "sharedMemorySize")
    assert missing == ["global", *(f"encoders.defaults.{key}" for key in of_workers)]


def test_the_schema_describes_every_value() -> None:
    """Editors show it."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"]["model"]["description"].startswith("Checkpoint that encoders and workers load")
    of_pools = schema["definitions"]["pool"]["properties"]
    assert "encoders.defaults.image: Image of a pool" in of_pools["image"]["description"]
    assert [name for name, part in of_pools.items() if not _is_described(part, schema)] == []
    assert [name for name, part in schema["properties"].items() if not _is_described(part, schema)] == ["global"]


def _is_described(part: dict[str, Any], schema: dict[str, Any]) -> bool:
    if "description" in part:
        return True
    while "properties" not in part:
        if not (inner := part.get("allOf", [part])[0].get("$ref")):
            return False
        part = schema["definitions"][inner.split("/")[-1]]
    return all(_is_described(each, schema) for each in part["properties"].values())


def _paths_of_schema(part: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    if "$ref" in part:
        part = schema["definitions"][part["$ref"].split("/")[-1]]
    for inner in part.get("allOf", []):
        yield from _paths_of_schema(inner, schema, path)
    if "properties" not in part and path:
        if "allOf" not in part:
            yield path
        return
    for name, inner in part.get("properties", {}).items():
        yield from _paths_of_schema(inner, schema, f"{path}.{name}" if path else name)


def _has(values: Any, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def test_every_value_is_described() -> None:
    listed = [row.split("`")[1] for row in (CHART / "README.md").read_text().splitlines() if row.startswith("| `")]
    for path in _leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert any(path == each or path.startswith(f"{each}.") for each in listed), f"{path} has no description"


def _leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_the_table_of_values_is_up_to_date() -> None:
    subprocess.run([sys.executable, CHART.parent / "docs.py", "--check"], check=True)


def test_the_settings_that_the_chart_knows_are_the_services() -> None:
    known = runpy.run_path(str(CHART.parent / "settings.py"))["known"]
    assert (CHART / "files" / "checks" / "known.yaml").read_text() == known(), "run python helm/settings.py"


@pytest.mark.parametrize("values", [None, *VALUES])
def test_helm_lint_has_no_complaints(values: str | None) -> None:
    given = with_registry(values_of(values)) if values else None
    report = lint(CHART, given, strict=True, kube_version="v1.34.0")
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize(("version", "is_refused"), [("v3.9.4", True), ("v3.10.0", False), ("v4.0.0-rc.1", False)])
def test_an_old_helm_is_refused(version: str, is_refused: bool, tmp_path: Path) -> None:
    chart = tmp_path / "vitrine"
    shutil.copytree(CHART, chart)
    checks = chart / "templates" / "_validate.tpl"
    checks.write_text(checks.read_text().replace(".Capabilities.HelmVersion.Version", f'"{version}"'))
    values = with_registry({"model": "m"})
    if is_refused:
        with pytest.raises(HelmRenderError, match=rf"this is Helm {version}: the chart needs 3\.10 or newer"):
            Chart.load(chart).render(values, name="demo", namespace="serving")
    else:
        assert Chart.load(chart).render(values, name="demo", namespace="serving")


@pytest.mark.parametrize(
    ("values", "commands"),
    [
        ({}, ['IMAGES="encoder llm" REGISTRY=r PUSH=1']),
        ({"images": {"registry": "r", "tag": "1.2.3-cpu"}}, ['IMAGES="encoder llm" REGISTRY=r PUSH=1 BASE=cpu']),
        ({"engine": "sglang", "sglang": {"receivers": ["10.0.0.0/8"]}}, ['IMAGES="encoder" REGISTRY=r PUSH=1']),
        (
            {"engine": "vllm"},
            ['IMAGES="encoder vllm" REGISTRY=r PUSH=1', "IMAGES=gateway BASE=cpu REGISTRY=r PUSH=1"],
        ),
        ({"mode": "rayservice"}, ['IMAGES="ray" REGISTRY=r PUSH=1']),
    ],
)
def test_notes_say_how_to_build_the_images_that_the_pods_have(values: dict[str, Any], commands: list[str]) -> None:
    text = notes({"model": "m", "images": {"registry": "r"}} | values)
    assert re.findall(r"(?m)^  make images (.*)$", text) == commands


@pytest.mark.parametrize("values", VALUES)
def test_notes_say_how_to_call_it(values: str) -> None:
    text = notes(values_of(values))
    services = of_kind(rendered(values), "Service").keys() or {"demo-vitrine-serve-svc"}
    called = re.findall(r"//([-a-z0-9]+)\.serving\.svc", text)
    assert called
    assert set(called) <= services
    request = json.loads(text.split("--data '")[1].split("'")[0])
    assert request["model"] in ("Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl-8b", "checkpoint")
    has_keys = bool(values_of(values).get("accessKeys"))
    assert ("Bearer YOUR-KEY" in text) == ("Secret api-keys" in text) == ("no authentication" not in text) == has_keys
    assert f"REGISTRY={with_registry(values_of(values))['images']['registry']} PUSH=1" in text
    has_tls = bool(values_of(values).get("tls", {}).get("llm", {}).get("secretName"))
    assert ("https://demo-vitrine-" in text) == has_tls
