"""Pods fit the images of deploy/docker: user, home, ports, environment."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.helm.rendering import CHART, of_kind, pods, rendered

DOCKERFILE = (CHART.parents[1] / "deploy" / "docker" / "Dockerfile").read_text()


def stage(name: str) -> str:
    """A stage's text together with that of the one it stands on."""
    stages = {match[2]: match for match in re.finditer(r"(?m)^FROM (\S+) AS (\S+)\n((?:(?!FROM ).*\n)*)", DOCKERFILE)}
    base, _, text = stages[name].groups()
    return (stage(base) if base in stages else "") + str(text)


def environment(text: str) -> dict[str, str]:
    lines = re.findall(r"(?m)^ENV (.+)$", text)
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


@pytest.mark.parametrize("component", ["encoder", "llm"])
def test_pods_fit_their_image(component: str) -> None:
    pod = pods("default")[f"demo-vitrine-{component}-default"]
    image = stage(component)
    context = pod.spec["securityContext"]
    assert re.findall(r"(?m)^USER (\S+)$", image)[-1] == f"{context['runAsUser']}:{context['runAsGroup']}"
    for name in ("HOME", "HF_HOME"):
        assert environment(image)[name] == pod.env[name]
    exposed = [int(port) for port in re.findall(r"(?m)^EXPOSE (.+)$", image)[-1].split()]
    assert exposed == [port["containerPort"] for port in pod.container["ports"]]
    # Arguments are added to the image's command, not put in its place.
    assert f'"vitrine-{component}"]' in re.findall(r"(?m)^ENTRYPOINT (.+)$", image)[-1]
    assert "command" not in pod.container


@pytest.mark.parametrize("component", ["encoder", "llm"])
def test_the_images_environment_does_not_contradict_the_configuration(component: str) -> None:
    """It would win over the file."""
    config_map = of_kind(rendered("default"), "ConfigMap")[f"demo-vitrine-{component}-default"]
    config = yaml.safe_load(config_map["data"]["config.yaml"])
    prefix = f"VITRINE_{component.upper()}_"
    for name, value in environment(stage(component)).items():
        if name.startswith(prefix):
            assert str(config[name.removeprefix(prefix).lower()]) == value
