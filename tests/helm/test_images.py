"""Pods fit the images of deploy/docker: user, home, ports, environment."""

from __future__ import annotations

import re

import pytest

from tests.helm.rendering import CHART, PodTemplate, pods, rendered
from tests.helm.test_config import config_files

DOCKERFILE = (CHART.parents[1] / "deploy" / "docker" / "Dockerfile").read_text()


def stage(name: str) -> str:
    """A stage's text together with that of the one it stands on."""
    stages = {match[2]: match for match in re.finditer(r"(?m)^FROM (\S+) AS (\S+)\n((?:(?!FROM ).*\n)*)", DOCKERFILE)}
    base, _, text = stages[name].groups()
    return (stage(base) if base in stages else "") + str(text)


def environment(text: str) -> dict[str, str]:
    lines = re.findall(r"(?m)^ENV (.+)$", text)
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


OURS = pytest.mark.parametrize(
    ("component", "values", "name"),
    [
        ("encoder", "default", "demo-vitrine-encoder-default"),
        ("llm", "default", "demo-vitrine-llm-default"),
        ("gateway", "vllm", "demo-vitrine-gateway"),
    ],
)


@OURS
def test_pods_fit_their_image(component: str, values: str, name: str) -> None:
    pod = pods(values)[name]
    _check_user_home_and_ports(pod, stage(component))
    # Arguments are added to the image's command, not put in its place.
    assert f'"vitrine-{component}"]' in re.findall(r"(?m)^ENTRYPOINT (.+)$", stage(component))[-1]
    assert "command" not in pod.container


def test_vllms_pods_fit_the_image_with_the_connector() -> None:
    pod = pods("vllm")["demo-vitrine-llm-default"]
    _check_user_home_and_ports(pod, stage("vllm"))
    assert re.findall(r"(?m)^ENTRYPOINT (.+)$", stage("vllm")) == ['["vllm", "serve"]']


def _check_user_home_and_ports(pod: PodTemplate, image: str) -> None:
    context = pod.spec["securityContext"]
    assert re.findall(r"(?m)^USER (\S+)$", image)[-1] == f"{context['runAsUser']}:{context['runAsGroup']}"
    if pod.program != "gateway":  # which keeps nothing
        for name in ("HOME", "HF_HOME"):
            assert environment(image)[name] == pod.env[name]
    exposed = [int(port) for port in re.findall(r"(?m)^EXPOSE (.+)$", image)[-1].split()]
    assert exposed == [port["containerPort"] for port in pod.container["ports"]]


@OURS
def test_the_images_environment_does_not_contradict_the_configuration(component: str, values: str, name: str) -> None:
    """It would win over the file."""
    config = config_files(rendered(values))[name]
    prefix = f"VITRINE_{component.upper()}_"
    for variable, value in environment(stage(component)).items():
        if variable.startswith(prefix):
            assert str(config[variable.removeprefix(prefix).lower()]) == value
