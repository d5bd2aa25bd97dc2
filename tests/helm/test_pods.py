"""Pods: images, environment, end, model cache."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helm_python import HelmRenderError

from tests.helm.rendering import VALUES, of_kind, pods, pods_of, render, rendered, values_of
from tests.helm.test_config import config_files

ENCODER, LLM = "demo-vitrine-encoder-default", "demo-vitrine-llm-default"


@pytest.mark.parametrize("values", VALUES)
def test_services_in_the_namespace_do_not_become_settings(values: str) -> None:
    for pod in pods(values).values():
        assert pod.spec["enableServiceLinks"] is False
        ours = {name for name in pod.env if name.startswith("VITRINE_") and not name.endswith("_CONFIG")}
        assert ours <= {"VITRINE_ENCODER_SGLANG_ADVERTISE_HOST"}


@pytest.mark.parametrize("values", VALUES)
def test_nothing_of_the_host_is_shared(values: str) -> None:
    for pod in pods(values).values():
        assert not {"hostIPC", "hostPID", "hostNetwork"} & pod.spec.keys()
        assert "privileged" not in pod.container["securityContext"]


@pytest.mark.parametrize("values", VALUES)
def test_only_who_asks_the_api_server_gets_a_token(values: str) -> None:
    for pod in pods(values).values():
        asks = "kubernetes:" in (pod.config_file or "")
        asks |= pod.name.endswith("head")  # KubeRay's autoscaler
        assert pod.spec["automountServiceAccountToken"] is asks


@pytest.mark.parametrize("values", VALUES)
def test_variables_are_set_once(values: str) -> None:
    for pod in pods(values).values():
        names = [each["name"] for each in pod.container["env"]]
        assert len(set(names)) == len(names)


class TestImages:
    def test_registry_repository_and_tag(self) -> None:
        found = pods("pools")
        assert found[ENCODER].container["image"] == "registry.example.com/team/vitrine-encoder:1.2.3"
        slices = found["demo-vitrine-encoder-slices"]
        assert slices.container["image"] == "registry.example.com/team/vitrine-encoder:experimental"
        assert found["demo-vitrine-llm-long"].container["imagePullPolicy"] == "Always"
        assert slices.spec["imagePullSecrets"] == [{"name": "registry"}]

    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            ("team/encoder", "host:5000/team/encoder:0.1.0"),
            ("encoder@sha256:0123", "host:5000/encoder@sha256:0123"),
            ("encoder:v1@sha256:0123", "host:5000/encoder:v1@sha256:0123"),
        ],
    )
    def test_tags_and_digests_of_their_own(self, image: str, expected: str) -> None:
        found = pods_of(render({"model": "m", "images": {"registry": "host:5000", "encoder": image}}))
        assert found[ENCODER].container["image"] == expected
        assert found[LLM].container["image"] == "host:5000/vitrine-llm:0.1.0"

    def test_repositories_may_have_registries_of_their_own(self) -> None:
        images = {"registry": "", "encoder": "host:5000/encoder", "llm": "ghcr.io/team/llm"}
        found = pods_of(render({"model": "m", "images": images}))
        assert found[ENCODER].container["image"] == "host:5000/encoder:0.1.0"
        assert found[LLM].container["image"] == "ghcr.io/team/llm:0.1.0"


class TestEnd:
    @pytest.mark.parametrize("values", sorted(VALUES.keys() - {"rayservice"}))
    def test_there_is_time_to_leave_the_services_and_drain(self, values: str) -> None:
        for name, pod in pods(values).items():
            config = config_files(rendered(values))[name]
            # SGLang drains until it is killed.
            drain_s = config.get("drain_timeout_s", config.get("shutdown_timeout", 60))
            sleep_s = pod.container.get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})["preStop"]["sleep"][
                "seconds"
            ]
            assert sleep_s == values_of(values).get("preStopSleepSeconds", 5)
            assert pod.spec["terminationGracePeriodSeconds"] == sleep_s + drain_s + 10

    def test_a_pool_has_its_own_time(self) -> None:
        found = pods("pools")
        assert found[ENCODER].spec["terminationGracePeriodSeconds"] == 5 + 30 + 10
        assert found["demo-vitrine-encoder-slices"].spec["terminationGracePeriodSeconds"] == 5 + 0 + 10
        assert found["demo-vitrine-llm-long"].spec["terminationGracePeriodSeconds"] == 5 + 60 + 10


class TestModelCache:
    def volume(self, values: dict[str, Any]) -> dict[str, Any]:
        (volume,) = {
            yaml.safe_dump(each)
            for pod in pods_of(render({"model": "m"} | values)).values()
            for each in pod.spec["volumes"]
            if each["name"] == "cache"
        }
        found: dict[str, Any] = yaml.safe_load(volume)
        return found

    def test_of_each_pod(self) -> None:
        assert self.volume({})["emptyDir"] == {"sizeLimit": "100Gi"}

    def test_a_claim_that_outlives_the_release(self) -> None:
        (claim,) = of_kind(rendered("cpu"), "PersistentVolumeClaim").values()
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
        assert claim["spec"]["storageClassName"] == "shared"
        volume = self.volume(values_of("cpu"))
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == "vision-models"

    def test_a_claim_that_is_there(self) -> None:
        values = {"modelCache": {"kind": "persistentVolumeClaim", "existingClaim": "theirs"}}
        assert self.volume(values)["persistentVolumeClaim"]["claimName"] == "theirs"
        assert not of_kind(render({"model": "m"} | values), "PersistentVolumeClaim")

    def test_a_folder_of_the_node_must_be_named(self) -> None:
        with pytest.raises(HelmRenderError, match=r"modelCache\.hostPath is required"):
            render({"model": "m", "modelCache": {"kind": "hostPath"}})

    def test_the_hubs_token_comes_from_a_secret(self) -> None:
        for values in ("cpu", "rayservice"):
            for pod in pods(values).values():
                assert pod.env["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
