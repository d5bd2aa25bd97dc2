"""Names of objects: unique, valid, and made from the release's."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from tests.helm.rendering import VALUES, Manifest, of_kind, render, rendered


def long_names() -> list[Manifest]:
    pools: dict[str, Any] = {"default": None, "a" * 20: {}}
    values = {"model": "m", "encoders": {"pools": pools}, "llm": {"pools": pools}}
    return render(values, release="r" * 53)


@pytest.mark.parametrize("values", VALUES)
def test_names_are_unique(values: str) -> None:
    counted = Counter((each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in rendered(values))
    assert max(counted.values()) == 1


def test_names_of_long_releases_are_cut() -> None:
    names = {(each["kind"], each["metadata"]["name"]) for each in long_names()}
    assert len(names) == len(long_names())
    for _, name in names:
        assert len(name) <= 46
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        assert name.startswith("rrrr")


def test_names_that_are_cut_alike_do_not_meet() -> None:
    one, other = (
        {each["metadata"]["name"] for each in render({"model": "m"}, release=f"{'r' * 50}-{end}")} for end in "ab"
    )
    assert not one & other


def test_names_of_a_release_called_like_the_chart_are_short() -> None:
    names = of_kind(render({"model": "m"}, release="vitrine"), "Deployment").keys()
    assert names == {"vitrine-encoder-default", "vitrine-llm-default"}


def test_names_can_be_given() -> None:
    assert of_kind(rendered("cpu"), "Deployment").keys() == {"vision-encoder-default", "vision-llm-default"}
    manifests = render({"model": "m", "nameOverride": "eyes"})
    assert of_kind(manifests, "Deployment").keys() == {"demo-eyes-encoder-default", "demo-eyes-llm-default"}


def test_names_leave_room_for_what_is_appended() -> None:
    """By the Deployment (a hash) and its ReplicaSet (five characters, after cutting to 58), and by KubeRay."""
    for deployment in of_kind(long_names(), "Deployment"):
        assert len(f"{deployment}-7c9f6d5b4d-") <= 58
    (service,) = of_kind(render({"model": "m", "mode": "rayservice"}, release="r" * 53), "RayService")
    assert len(service) <= 47
