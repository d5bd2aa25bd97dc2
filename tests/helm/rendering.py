"""The chart as Helm renders it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

CHART = Path(__file__).parents[2] / "helm" / "vitrine"
VALUES = {file.stem: file for file in sorted((Path(__file__).parent / "values").glob("*.yaml"))}
NAMESPACE = "serving"
REGISTRY = "registry.example.com/team"

Manifest = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's usual loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{sorted(twice)} twice{node.start_mark}")
        return super().construct_mapping(node, deep)


@cache
def _chart() -> Chart:
    return Chart.load(CHART)


def with_registry(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a registry for images, which the chart requires."""
    return values | {"images": {"registry": REGISTRY} | values.get("images", {})}


def render(values: dict[str, Any], release: str = "demo") -> list[Manifest]:
    """All objects of a release. Raises helm_python.HelmError where Helm refuses."""
    files = _chart().render(with_registry(values), name=release, namespace=NAMESPACE)
    manifests = [text for file, text in files.items() if file.endswith(".yaml")]
    return [document for text in manifests for document in yaml.load_all(text, _Loader) if document]


def notes(values: dict[str, Any]) -> str:
    """What Helm says after installing."""
    return _chart().render(with_registry(values), name="demo", namespace=NAMESPACE)["vitrine/templates/NOTES.txt"]


def values_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(VALUES[name].read_text())
    return values


@cache
def rendered(name: str) -> list[Manifest]:
    """The objects that values/NAME.yaml gives."""
    return render(values_of(name))


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """By name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] in kinds}


@dataclass(frozen=True)
class PodTemplate:
    name: str
    metadata: dict[str, Any]
    spec: dict[str, Any]

    @property
    def container(self) -> dict[str, Any]:
        """The service's; others stand behind it."""
        return dict(self.spec["containers"][0])

    @property
    def config_file(self) -> str | None:
        """The text of the service's configuration file; None of Ray's pods, which have none."""
        text: str | None = self.metadata.get("annotations", {}).get("vitrine/config")
        return text

    @property
    def program(self) -> str:
        """What the container runs: "encoder", "llm", "gateway", "vllm" or "sglang"; of Ray's pods its name."""
        variables = (re.fullmatch(r"VITRINE_([A-Z]+)_CONFIG", name) for name in self.env)
        ours = [variable[1].lower() for variable in variables if variable]
        if ours:
            return ours[0]
        if "command" in self.container:
            return "sglang"
        return "vllm" if "VLLM_LOGGING_LEVEL" in self.env else str(self.container["name"])

    @property
    def env(self) -> dict[str, Any]:
        """Values of variables, or where they come from."""
        return {each["name"]: each.get("value", each.get("valueFrom")) for each in self.container["env"]}


def pod_templates(manifests: list[Manifest]) -> Iterator[PodTemplate]:
    for each in manifests:
        name = each["metadata"]["name"]
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield PodTemplate(name, **each["spec"]["template"])
        elif each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield PodTemplate(f"{name}-{group.get('groupName', 'head')}", **group["template"])


def pods_of(manifests: list[Manifest]) -> dict[str, PodTemplate]:
    """Pod templates by name: that of the Deployment or StatefulSet, or of the RayService and the group."""
    return {pod.name: pod for pod in pod_templates(manifests)}


def pods_selected(selector: dict[str, str], manifests: list[Manifest]) -> set[str]:
    """Names of the pod templates with these labels."""
    return {pod.name for pod in pod_templates(manifests) if selector.items() <= pod.metadata["labels"].items()}


def pods(values: str) -> dict[str, PodTemplate]:
    """The pod templates that values/NAME.yaml gives."""
    return pods_of(rendered(values))
