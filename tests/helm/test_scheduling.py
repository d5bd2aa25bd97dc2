"""Where pods run, and which GPUs they see."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmRenderError

from tests.helm.rendering import of_kind, pods, pods_of, render, rendered, values_of

ENCODER, LLM = "demo-vitrine-encoder-default", "demo-vitrine-llm-default"
REQUIRED, PREFERRED = (f"{how}DuringSchedulingIgnoredDuringExecution" for how in ("required", "preferred"))


class TestGpus:
    def test_one_each(self) -> None:
        for pod in pods("default").values():
            assert pod.container["resources"]["limits"]["nvidia.com/gpu"] == 1
            assert "memory" in pod.container["resources"]["limits"]

    def test_none(self) -> None:
        for pod in pods("cpu").values():
            assert "nvidia.com/gpu" not in pod.container["resources"]["limits"]

    def test_slices(self) -> None:
        limits = pods("pools")["demo-vitrine-encoder-slices"].container["resources"]["limits"]
        assert limits["nvidia.com/mig-1g.10gb"] == 1
        assert "nvidia.com/gpu" not in limits

    def test_a_pool_alone_can_have_none(self) -> None:
        pools = {"default": {"gpu": {"count": 0}, "podDisruptionBudget": {"enabled": False}, "replicas": 0}}
        manifests = render({"model": "m", "encoders": {"pools": pools}})
        assert "nvidia.com/gpu" not in pods_of(manifests)[ENCODER].container["resources"]["limits"]
        assert of_kind(manifests, "Deployment")[ENCODER]["spec"]["replicas"] == 0
        assert ENCODER not in of_kind(manifests, "PodDisruptionBudget")


class TestScheduling:
    def test_what_a_pool_says_is_in_its_pods(self) -> None:
        found = pods("pools")
        assert found[ENCODER].spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L40S"}
        assert found[ENCODER].spec["tolerations"][0]["key"] == "nvidia.com/gpu"
        assert "tolerations" not in found["demo-vitrine-encoder-slices"].spec
        assert found["demo-vitrine-llm-short"].spec["priorityClassName"] == "serving"
        assert found["demo-vitrine-llm-short"].metadata["labels"]["team"] == "vision"
        assert found["demo-vitrine-llm-short"].metadata["annotations"]["note"] == "short prompts"
        long = found["demo-vitrine-llm-long"]
        assert long.spec["runtimeClassName"] == "gvisor"
        assert long.container["args"] == ["--max-num-seqs", "8"]
        assert long.env["EXTRA"] == "1"
        assert long.env["NODE"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
        assert long.env["EVERYWHERE"] == "2"
        assert list(long.spec["affinity"]) == ["nodeAffinity"]
        assert {"name": "data", "mountPath": "/data"} in long.container["volumeMounts"]

    def test_spread_is_over_the_pools_own_pods(self) -> None:
        for name in ("default", "slices"):
            pod = pods("pools")[f"demo-vitrine-encoder-{name}"]
            (constraint,) = pod.spec["topologySpreadConstraints"]
            assert constraint["topologyKey"] == "kubernetes.io/hostname"
            assert constraint["labelSelector"]["matchLabels"].items() <= pod.metadata["labels"].items()
            assert constraint["labelSelector"]["matchLabels"]["vitrine/pool"] == name

    def test_by_default_pods_have_no_affinity(self) -> None:
        for pod in pods("default").values():
            assert not {"affinity", "topologySpreadConstraints", "runtimeClassName", "resourceClaims"} & pod.spec.keys()


def selects(term: dict[str, Any], labels: dict[str, str]) -> bool:
    selector = term["labelSelector"]
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


class TestColocation:
    def test_required_and_next_to_what_the_pool_says(self) -> None:
        found = pods("runtime-class")
        own, ours = found[LLM].spec["affinity"]["podAffinity"][REQUIRED]
        assert own["labelSelector"] == {"matchLabels": {"app": "gateway"}}
        assert ours["topologyKey"] == "kubernetes.io/hostname"
        assert selects(ours, found[ENCODER].metadata["labels"])
        assert not selects(ours, found[LLM].metadata["labels"])
        assert "podAffinity" not in found[ENCODER].spec["affinity"]

    def test_preferred_and_only_with_the_pools_encoders(self) -> None:
        found = pods("resource-claim")
        encoders = {name: found[f"demo-vitrine-encoder-{name}"].metadata["labels"] for name in ("default", "more")}
        for llm, expected in ((LLM, {"default", "more"}), ("demo-vitrine-llm-other", {"default"})):
            (preference,) = found[llm].spec["affinity"]["podAffinity"][PREFERRED]
            assert {name for name in encoders if selects(preference["podAffinityTerm"], encoders[name])} == expected

    def test_with_every_gpu_in_sight_a_node_has_one_pod_of_a_pool(self) -> None:
        for pod in pods("runtime-class").values():
            assert pod.spec["runtimeClassName"] == "nvidia"
            assert pod.env["NVIDIA_VISIBLE_DEVICES"] == "all"
            (term,) = pod.spec["affinity"]["podAntiAffinity"][REQUIRED]
            assert selects(term, pod.metadata["labels"])
        assert not selects(term, pods("runtime-class")[ENCODER].metadata["labels"])

    @pytest.mark.parametrize("values", ["runtime-class", "resource-claim"])
    def test_pods_are_told_which_gpus_are_theirs(self, values: str) -> None:
        found = pods(values)
        assert {pod.env["CUDA_DEVICE_ORDER"] for pod in found.values()} == {"PCI_BUS_ID"}
        own = [pod.env["CUDA_VISIBLE_DEVICES"].split(",")[0] for pod in found.values()]
        assert len(set(own)) == len(own)

    def test_a_shared_claim_takes_the_place_of_limits(self) -> None:
        manifests = rendered("resource-claim")
        (claim,) = of_kind(manifests, "ResourceClaim")
        for pod in pods_of(manifests).values():
            (reference,) = pod.spec["resourceClaims"]
            assert reference["resourceClaimName"] == claim
            assert pod.container["resources"]["claims"] == [{"name": reference["name"]}]
            assert "nvidia.com/gpu" not in pod.container["resources"]["limits"]

    def test_a_claim_of_ones_own_is_used(self) -> None:
        values = values_of("resource-claim")
        values["colocation"]["resourceClaim"] = {"name": "theirs"}
        manifests = render(values)
        assert not of_kind(manifests, "ResourceClaim")
        for pod in pods_of(manifests).values():
            assert pod.spec["resourceClaims"][0]["resourceClaimName"] == "theirs"

    def test_which_gpus_must_be_said(self) -> None:
        values = values_of("runtime-class")
        del values["llm"]["defaults"]["cudaVisibleDevices"]
        with pytest.raises(HelmRenderError, match='cudaVisibleDevices of llm pool "default" must say'):
            render(values)
