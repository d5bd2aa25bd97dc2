"""What the chart would ignore, or what would break only in the cluster, is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from helm_python import HelmRenderError

from tests.helm.rendering import CHART, of_kind, pods_of, render
from vitrine_vlm.deploy.ray_serve.config import EncoderPool, LlmPool


def encoders(**settings: Any) -> dict[str, Any]:
    return {"encoders": {"defaults": settings}}


def llm(**settings: Any) -> dict[str, Any]:
    return {"llm": {"defaults": settings}}


def refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmRenderError, match=message):
        render({"model": "m"} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (encoders(config={"quantisation": "fp8"}), r"encoders\.pools\.default\.config\.quantisation: there is no such"),
        (llm(config={"max_num_sequences": 8}), r"llm\.pools\.default\.config\.max_num_sequences: there is no such"),
        ({"engine": "vllm", "gateway": {"config": {"max_inflight": 1}}}, r"gateway\.config\.max_inflight: there is no"),
        ({"vllm": {"connector": {"transports": "shm"}}}, r"vllm\.connector\.transports: there is no such"),
        (encoders(config={"port": 1}), r"config\.port is not for values: ports of pods are fixed"),
        (llm(config={"api_key": "k"}), r"config\.api_key is not for values: name a Secret in accessKeys\.secretName"),
        (llm(config={"encoders": "a:1"}), r"config\.encoders is not for values: set encoderPools"),
        ({"vllm": {"connector": {"tenant": "t"}}}, r"tenant is not for values: set vllm\.tenant"),
        ({"engine": "vllm"} | llm(config={"ec_transfer_config": {}}), r"ec_transfer_config.*set vllm\.connector"),
        ({"engine": "vllm", "gateway": {"config": {"servers": "a:1"}}}, r"gateway\.config\.servers is not for values"),
        (llm(extraArgs=["--grpc-port=1"]), r"llm\.pools\.default\.extraArgs: --grpc-port=1 is not for values"),
        (encoders(env={"VITRINE_ENCODER_PORT": "1"}), r"env\.VITRINE_ENCODER_PORT is not for values: ports"),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    refused(values, message)


def test_settings_that_are_there_are_taken() -> None:
    values = encoders(extraArgs=["--no-cuda-graphs", "--max-items", "3"], env={"VITRINE_ENCODER_MAX_ITEMS": "2"})
    assert render({"model": "m"} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (encoders(gpu={"count": 2}), r"encoders\.pools\.default has gpu\.count 2, but its pods use 1: an encoder uses"),
        (llm(gpu={"count": 2}), r"llm\.pools\.default has gpu\.count 2, but its pods use 1: set config\.tp"),
        (llm(config={"tp": 4}), r"has gpu\.count 1, but its pods use 4: set config\.tp and gpu\.count alike"),
        (llm(gpu={"count": 2}, extraArgs=["--tp=2"]), r"extraArgs: --tp=2 says how many GPUs .* set config\.tp"),
        (
            llm(gpu={"count": 2}, env={"VITRINE_LLM_TP": "2"}),
            r"env\.VITRINE_LLM_TP says how many GPUs .* set config\.tp",
        ),
        ({"engine": "vllm"} | llm(config={"tensor_parallel_size": 2}), r"set config\.tensor_parallel_size and gpu"),
        ({"engine": "sglang", "sglang": {"receivers": ["10.0.0.0/8"]}} | llm(gpu={"count": 2}), r"set config\.tp_size"),
        ({"mode": "rayservice"} | llm(config={"tp": 2}), r"llm has gpu\.count 1, but its pods use 2"),
    ],
)
def test_gpus_unlike_what_is_used(values: dict[str, Any], message: str) -> None:
    refused(values, message)


@pytest.mark.parametrize(
    ("kind", "extra"), [("hpa", {}), ("keda", {"keda": {"prometheusUrl": "http://p"}}), ("ray", {"mode": "rayservice"})]
)
def test_autoscalers_with_more_at_least_than_at_most(kind: str, extra: dict[str, Any]) -> None:
    scaling = {"kind": kind, "minReplicas": 5, "maxReplicas": 2}
    refused(extra | encoders(autoscaling=scaling), r"autoscaling: minReplicas 5 is more than maxReplicas 2")


@pytest.mark.parametrize(
    ("release", "values"),
    [("1st", {}), ("my.app", {}), ("demo", {"fullnameOverride": "Vision"}), ("demo", {"nameOverride": "a_b"})],
)
def test_names_that_kubernetes_refuses(release: str, values: dict[str, Any]) -> None:
    with pytest.raises(HelmRenderError, match="Kubernetes refuses Services named"):
        render({"model": "m"} | values, release=release)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nameOverride": "a", "fullnameOverride": "b"}, "nameOverride does nothing beside fullnameOverride"),
        (
            {"accessKeys": {"secretName": "k"}, "monitoring": {"serviceMonitor": {"apiKeySecretName": "s"}}},
            "apiKeySecretName does nothing without",
        ),
        ({"ray": {"workers": {"maxReplicas": 2}}}, r"ray\.workers does nothing, as mode deployments has none of Ray's"),
        ({"vllm": {"mode": "P"}}, r"vllm\.mode does nothing, as engine is vitrine"),
        ({"sglang": {"receivers": ["10.0.0.0/8"]}}, r"sglang\.receivers does nothing, as engine is vitrine"),
        (
            {"engine": "vllm", "vllm": {"mode": "P"}, "gateway": {"replicas": 3}},
            r"gateway\.replicas does nothing, as only",
        ),
        ({"colocation": {"affinity": "required"}}, r"colocation\.affinity does nothing, as colocation\.enabled is off"),
        ({"networkPolicy": {"clients": [{"podSelector": {}}]}}, r"networkPolicy\.clients does nothing without"),
        ({"tls": {"encoders": {"clientSecretName": "s"}}}, "clientSecretName does nothing without"),
        ({"tls": {"encoders": {"secretName": "s", "allowedPeers": "a"}}}, "nothing without tls.encoders.clientAuth"),
        ({"modelCache": {"existingClaim": "c"}}, r"modelCache\.existingClaim .* modelCache\.kind emptyDir"),
        ({"modelCache": {"hostPath": "/models"}}, r"modelCache\.hostPath does nothing with modelCache\.kind emptyDir"),
        ({"service": {"nodePorts": {"http": 30000}}}, "do nothing with service.type ClusterIP"),
        ({"service": {"type": "NodePort", "loadBalancerSourceRanges": ["10.0.0.0/8"]}}, "with service.type NodePort"),
        (
            {"engine": "vllm", "service": {"type": "NodePort", "nodePorts": {"grpc": 30001}}},
            "users of engine vllm have HTTP alone",
        ),
        ({"commonLabels": {"helm.sh/chart": "mine"}}, r"commonLabels: label helm\.sh/chart is the chart's own"),
        (llm(prefillPools=["p"]), "only pools of role decode use prefill pools"),
        (llm(podLabels={"vitrine/pool": "other"}), r"label vitrine/pool is the chart's own"),
        (
            {"llm": {"pools": {"default": {"role": "decode", "encoderPools": ["default"]}, "p": {"role": "prefill"}}}},
            "a pool of role decode uses no encoders",
        ),
        (
            {"colocation": {"enabled": True, "gpuSharing": "runtimeClass"}}
            | encoders(cudaVisibleDevices="0", runtimeClassName="gvisor")
            | llm(cudaVisibleDevices="1"),
            r"encoders\.pools\.default\.runtimeClassName does nothing with",
        ),
    ],
)
def test_values_that_would_do_nothing(values: dict[str, Any], message: str) -> None:
    refused(values, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (encoders(env={"A": "1"}), r"does not use encoders\.env: .* ray\.workers"),
        (llm(image="x"), r"does not use llm\.image"),
        (llm(resources={"requests": {"cpu": "64"}}), r"does not use llm\.resources"),
        (encoders(nodeSelector={"a": "b"}), r"does not use encoders\.nodeSelector"),
        (encoders(podAnnotations={"a": "b"}), r"does not use encoders\.podAnnotations"),
        ({"llm": {"pools": {"default": {"priorityClassName": "p"}}}}, r"does not use llm\.priorityClassName"),
        (llm(gpu={"resource": "nvidia.com/mig-1g.10gb"}), r"does not use llm\.gpu"),
        (llm(autoscaling={"behavior": {"scaleUp": {}}}), r"does not use llm\.autoscaling"),
        (llm(initContainers=[{"name": "c"}]), r"does not use llm\.initContainers"),
        ({"ray": {"head": {"podLabels": {"vitrine/pool": "p"}}}}, r"ray\.head\.podLabels: label vitrine/pool"),
        (llm(config={"metrics_host": "::"}), r"llm\.config\.metrics_host is not for values in mode rayservice"),
        ({"networkPolicy": {"encoderClients": [{"podSelector": {}}]}}, r"does not use networkPolicy\.encoderClients"),
        (
            {"accessKeys": {"secretName": "k"}, "monitoring": {"serviceMonitor": {"enabled": True}}},
            r"apiKeySecretName is required in mode rayservice with accessKeys",
        ),
        ({"discovery": "dns"}, "does not use discovery"),
        ({"service": {"type": "LoadBalancer"}}, "does not use service"),
        ({"ray": {"workers": {"minReplicas": 3, "maxReplicas": 2}}}, r"minReplicas 3 is more than maxReplicas 2"),
        (encoders(replicas=4), r"need 5 GPUs, but ray\.workers have 2: 1 pods with 2 each"),
    ],
)
def test_what_mode_rayservice_does_not_use(values: dict[str, Any], message: str) -> None:
    refused({"mode": "rayservice"} | values, message)


@pytest.mark.parametrize("mode", ["deployments", "rayservice"])
def test_images_without_a_registry(mode: str) -> None:
    message = r"images\.registry is required, as there is no published image vitrine-(encoder|ray): build it"
    refused({"mode": mode, "images": {"registry": ""}}, message)


def test_no_value_changes_selectors_of_objects_that_keep_their_names() -> None:
    """Kubernetes refuses another selector for a Deployment that is there."""
    before, after = (
        of_kind(render({"model": "m", **values}), "Deployment")
        for values in ({}, {"fullnameOverride": "demo-vitrine", "llm": {"defaults": {"podLabels": {"a": "b"}}}})
    )
    assert before.keys() == after.keys()
    for name, deployment in before.items():
        assert deployment["spec"]["selector"] == after[name]["spec"]["selector"]
    named = of_kind(render({"model": "m", "nameOverride": "eyes"}), "Deployment")["demo-eyes-encoder-default"]
    assert named["spec"]["selector"] == before["demo-vitrine-encoder-default"]["spec"]["selector"]


def test_workers_on_several_gpus_have_memory_for_what_they_share() -> None:
    """NCCL's processes of one node meet in /dev/shm, of which Kubernetes gives 64 MiB."""

    def shared(settings: dict[str, Any]) -> Any:
        pod = pods_of(render({"model": "m"} | llm(**settings)))["demo-vitrine-llm-default"]
        mounts = {each["mountPath"]: each["name"] for each in pod.container["volumeMounts"]}
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        return volumes[mounts["/dev/shm"]]["emptyDir"] if "/dev/shm" in mounts else None

    assert shared({}) is None
    two = {"gpu": {"count": 2}, "config": {"tp": 2}}
    assert shared(two) == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert shared(two | {"sharedMemorySize": "1Gi"}) == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_the_application_refuses_no_setting_that_the_chart_takes() -> None:
    """It would say so only in Ray's log."""
    checks = (CHART / "templates" / "_validate.tpl").read_text()
    own = yaml.safe_load((CHART / "files" / "checks" / "own_settings.yaml").read_text()).keys()
    for name in EncoderPool.chosen_here | LlmPool.chosen_here:
        assert name in own or f'"{name}"' in checks, name


def test_rays_ports_are_closed_by_default() -> None:
    """They run code for all who reach them."""
    manifests = render({"model": "m", "mode": "rayservice"})
    (service,) = of_kind(manifests, "RayService").values()
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    (policy,) = of_kind(manifests, "NetworkPolicy").values()
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    opened = {"model": "m", "mode": "rayservice", "networkPolicy": {"enabled": False}, "ray": {"authMode": "disabled"}}
    assert not of_kind(render(opened), "NetworkPolicy")
    (service,) = of_kind(render(opened), "RayService").values()
    assert "authOptions" not in service["spec"]["rayClusterConfig"]
    assert not of_kind(render({"model": "m"}), "NetworkPolicy")
