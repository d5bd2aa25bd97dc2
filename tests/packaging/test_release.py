"""The release workflow: it keeps to GitHub's schema, runs what it pins, and asks for versions that fit."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.docker.tools import check, find_tool
from tests.packaging.release import faults, notes

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/release.yml"
CHART = "version: 1.2.3\nappVersion: 1.2.3\n"
CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n- new\n\n## [1.2.3] - 2026-12-01\n\n### Added\n- this\n\n## [1.2.2]\n\n- old\n"
)
IN_A_CLONE = pytest.mark.skipif(not WORKFLOW.exists(), reason="a source distribution has no workflows")


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"] if WORKFLOW.exists() else {}
    return found


def steps() -> list[dict[str, Any]]:
    return [step for job in jobs().values() for step in job["steps"]]


@IN_A_CLONE
def test_it_keeps_to_the_schema_of_workflows() -> None:
    checker = find_tool("check-jsonschema", "pip install check-jsonschema")
    check(checker, "--builtin-schema", "vendor.github-workflows", str(WORKFLOW))


@IN_A_CLONE
def test_actions_are_pinned_and_one_has_one_version() -> None:
    used = re.findall(r"uses: (\S+)@(\S+) # (v\d+\.\d+\.\d+)$", WORKFLOW.read_text(), re.MULTILINE)
    assert len(used) == sum("uses" in step for step in steps())
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for _, commit, _ in used)
    assert len({name for name, _, _ in used}) == len(set(used))


@IN_A_CLONE
def test_a_fork_publishes_under_its_own_name() -> None:
    """No owner stands in the workflow, and no secret but the token that every run has."""
    text = WORKFLOW.read_text()
    assert "secrets." not in text
    named = re.findall(r"ghcr\.io/(\S+)", text)
    assert named and all(each.startswith("${GITHUB_REPOSITORY_OWNER,,}") for each in named), (
        "ghcr.io wants small letters"
    )


@IN_A_CLONE
def test_nothing_is_published_but_for_a_tag_and_after_the_tests() -> None:
    publishing = [
        step for step in steps() if re.search(r" push|cosign|attest@|login", f"{step.get('uses')} {step.get('run')}")
    ]
    assert len(publishing) >= 8
    assert all(step["if"] == "env.PUBLISH" for step in publishing)
    assert yaml.safe_load(WORKFLOW.read_text())["env"]["PUBLISH"] == "${{ github.ref_type == 'tag' && '1' || '' }}"
    assert jobs()["release"]["if"] == "github.ref_type == 'tag'"
    assert all(job["needs"] for name, job in jobs().items() if name != "test")


@IN_A_CLONE
def test_jobs_may_do_what_they_do_and_no_more() -> None:
    assert yaml.safe_load(WORKFLOW.read_text())["permissions"] == {}
    for name, job in jobs().items():
        text = yaml.safe_dump(job["steps"])
        may = {right for right, value in job["permissions"].items() if value == "write"}
        assert ("packages" in may) == ("login ghcr.io" in text), name
        assert ("id-token" in may) == ("cosign sign" in text or "actions/attest" in text), name
        assert ("attestations" in may) == ("actions/attest" in text), name
        assert ("contents" in may) == ("gh release create" in text), name


@IN_A_CLONE
@pytest.mark.parametrize("step", [step for step in steps() if "run" in step], ids=lambda step: step["name"])
def test_bash_reads_every_command(step: dict[str, Any]) -> None:
    check("bash", "-n", "-c", step["run"])
    assert "${{" not in step["run"], "what a stranger may choose reaches a shell as a variable only"


@IN_A_CLONE
def test_the_chart_that_is_published_has_a_registry(tmp_path: Path) -> None:
    [command] = [
        line for step in steps() for line in step.get("run", "").splitlines() if line.startswith("sed --in-place")
    ]
    values = tmp_path / "helm/vitrine/values.yaml"
    values.parent.mkdir(parents=True)
    values.write_text((ROOT / "helm/vitrine/values.yaml").read_text())
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env={"GITHUB_REPOSITORY_OWNER": "Some-Fork"}, check=True)
    before = yaml.safe_load((ROOT / "helm/vitrine/values.yaml").read_text())
    assert yaml.safe_load(values.read_text()) == before | {
        "images": before["images"] | {"registry": "ghcr.io/some-fork"}
    }


@IN_A_CLONE
def test_all_images_are_released() -> None:
    images = runpy.run_path(str(ROOT / "deploy/docker/images.py"))["IMAGES"]
    listed = [(each["base"], each["image"]) for each in jobs()["images"]["strategy"]["matrix"]["include"]]
    assert sorted(listed) == sorted((base, image) for base, of in images.items() for image in of)


@pytest.mark.parametrize(
    ("tag", "chart", "changelog", "fault"),
    [
        ("v1.2.3", CHART, CHANGELOG, None),
        ("", CHART, "", None),
        ("v1.2.4", CHART, CHANGELOG, "the tag is v1.2.4, but pyproject.toml says 1.2.3"),
        ("1.2.3", CHART, CHANGELOG, "the tag is 1.2.3"),
        ("v1.2.3", CHART.replace("appVersion: 1.2.3", "appVersion: 1.2.2"), CHANGELOG, "appVersion is 1.2.2"),
        ("", "version: 1.2.3\n", CHANGELOG, "appVersion is None"),
        ("v1.2.3", CHART, CHANGELOG.replace("[1.2.3]", "[1.3.0]"), "has no section [1.2.3]"),
    ],
)
def test_what_a_release_needs(tag: str, chart: str, changelog: str, fault: str | None) -> None:
    found = faults(tag, "1.2.3", chart, changelog)
    assert not found if fault is None else len(found) == 1 and fault in found[0]


def test_notes_are_the_versions_section_alone() -> None:
    assert notes(CHANGELOG, "1.2.3") == "### Added\n- this"
    assert notes(CHANGELOG, "1.2.2") == "- old"
    assert notes(CHANGELOG, "1.2") == ""


def test_the_project_and_its_chart_have_one_version() -> None:
    check(sys.executable, str(ROOT / "tests/packaging/release.py"))
