"""Mode rayservice: the application takes its arguments, KubeRay finds what it needs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import yaml
from helm_python import HelmRenderError
from ray.serve.schema import ServeDeploySchema

from tests.helm.rendering import of_kind, pods, pods_of, render, rendered, values_of
from vitrine_vlm.deploy.ray_serve.application import _STOP_MARGIN_S, _options
from vitrine_vlm.deploy.ray_serve.config import ServeArguments
from vitrine_vlm.deploy.ray_serve.llm import QUEUED_TOKENS


def spec_of(values: dict[str, Any]) -> dict[str, Any]:
    (service,) = of_kind(render(values), "RayService").values()
    return dict(service["spec"])


def serve_config(values: dict[str, Any]) -> dict[str, Any]:
    config = yaml.safe_load(spec_of(values)["serveConfigV2"])
    assert isinstance(config, dict)
    return config


def arguments(values: dict[str, Any]) -> ServeArguments:
    (application,) = serve_config(values)["applications"]
    return ServeArguments(**application["args"])


def test_nothing_else_serves() -> None:
    kinds = {each["kind"] for each in rendered("rayservice") if each["metadata"]["name"] != "demo-vitrine-test"}
    assert kinds == {"RayService", "ServiceAccount", "NetworkPolicy", "PodMonitor"}


def test_ray_serve_takes_the_configuration() -> None:
    """Ray's schema lets misspelt keys pass, so that every key is looked up, too."""
    config = serve_config(values_of("rayservice"))
    schema = ServeDeploySchema(**config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert config["applications"][0].keys() <= type(schema.applications[0]).model_fields.keys()
    for options in ("http_options", "grpc_options"):
        assert config[options].keys() <= type(getattr(schema, options)).model_fields.keys()


def test_the_application_and_its_grpc_service_are_there() -> None:
    config = serve_config(values_of("rayservice"))
    module, _, name = config["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    for function in config["grpc_options"]["grpc_servicer_functions"]:
        module, _, name = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_pods_end_no_sooner_than_the_replicas_in_them() -> None:
    found = arguments(values_of("rayservice"))
    settings = [pool.service_settings(found.model).model_dump() for pool in (found.encoders, found.llm)]
    drain_s = max(each["drain_timeout_s"] for each in settings)
    options = _options(found.llm, {"stat": QUEUED_TOKENS, "target": 1.0}, drain_s + _STOP_MARGIN_S)
    for pod in pods("rayservice").values():
        assert pod.spec["terminationGracePeriodSeconds"] > options["graceful_shutdown_timeout_s"] > 2 * drain_s


def test_pools_become_arguments() -> None:
    found = arguments(values_of("rayservice"))
    assert found.model == "Qwen/Qwen3-VL-8B-Instruct"
    assert (found.encoders.min_replicas, found.encoders.max_replicas, found.encoders.num_gpus) == (1, 6, 1)
    assert found.encoders.target_queue_s == 0.5
    assert (found.llm.min_replicas, found.llm.max_replicas) == (2, 2)
    encoder, llm = found.encoders.service_settings(found.model), found.llm.service_settings(found.model)
    assert encoder.model_dump()["quantization"] == "fp8"
    assert llm.model_dump()["kv_cache_tokens"] == 1048576
    assert llm.model_dump()["drain_timeout_s"] == 90
    for settings in (encoder.model_dump(), llm.model_dump()):
        assert (settings["revision"], settings["served_model_name"]) == ("main", "qwen3-vl-8b")
        assert settings["log_format"] == "json"


def test_with_the_defaults_every_replica_has_a_gpu() -> None:
    values = {"model": "m", "mode": "rayservice"}
    found = arguments(values)
    cluster = spec_of(values)["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * group["replicas"]
    pools = (found.encoders, found.llm)
    assert sum(pool.num_gpus * pool.max_replicas for pool in pools) <= gpus
    cpus = int(container["resources"]["limits"]["cpu"]) * group["replicas"]
    assert sum(pool.num_cpus * pool.max_replicas for pool in (*pools,)) + found.gateway.num_cpus <= cpus
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_kuberay_makes_a_service_of_the_ports() -> None:
    config = serve_config(values_of("rayservice"))
    head = pods("rayservice")["demo-vitrine-head"]
    ports = {port["name"]: port["containerPort"] for port in head.container["ports"]}
    assert ports["serve"] == config["http_options"]["port"]
    assert ports["serve-grpc"] == config["grpc_options"]["port"]
    assert config["http_options"]["host"] == "0.0.0.0"


def test_ray_adds_pods_only_if_it_may() -> None:
    spec = spec_of(values_of("rayservice"))["rayClusterConfig"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    values = {"model": "m", "mode": "rayservice"}
    assert spec_of(values)["rayClusterConfig"]["enableInTreeAutoscaling"] is False
    for pod in pods_of(render(values)).values():
        assert pod.spec["automountServiceAccountToken"] is False


def test_pods_have_room_for_rays_shared_memory() -> None:
    for pod in pods("rayservice").values():
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        mounts = {each["mountPath"]: each["name"] for each in pod.container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
        assert volumes[mounts["/cache"]]["persistentVolumeClaim"]["claimName"] == "models"
    assert pods("rayservice")["demo-vitrine-gpu"].env["RAY_LOG_TO_STDERR"] == "1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoders": {"pools": {"two": {}}}}, r"encoders\.pools has 2"),
        ({"llm": {"defaults": {"autoscaling": {"kind": "hpa"}}}}, "scales by Ray"),
        ({"tls": {"llm": {"secretName": "s"}}}, "serves without TLS"),
        ({"colocation": {"enabled": True}}, "leave colocation off"),
    ],
)
def test_what_ray_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmRenderError, match=message):
        render({"model": "m", "mode": "rayservice"} | values)
