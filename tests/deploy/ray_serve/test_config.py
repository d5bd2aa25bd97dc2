"""Arguments of the application: what is taken, what is refused, and what Ray Serve gets of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from click.testing import CliRunner
from ray._common.utils import import_attr
from ray.serve import scripts
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from vitrine_vlm.deploy.ray_serve import config as config_module
from vitrine_vlm.deploy.ray_serve.application import build
from vitrine_vlm.deploy.ray_serve.config import ServeArguments
from vitrine_vlm.deploy.ray_serve.llm import gpu_environment
from vitrine_vlm.deploy.ray_serve.placement import shortages, stopping
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.llm_worker.config import LlmConfig

EXAMPLE = Path(config_module.__file__).with_name("config.yaml")


def deployments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What Ray Serve makes of them, by deployment."""
    application = call_user_app_builder_with_args_if_necessary(build, arguments)  # type: ignore[arg-type]
    return {each.name: each for each in build_app(application, name="vitrine").deployments}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model"),
        ({"model": "m", "encoder": {}}, "encoder"),
        ({"model": "m", "encoders": {"max_replica": 2}}, "max_replica"),
        (
            {"model": "m", "encoders": {"min_replicas": 3, "max_replicas": 2}},
            "3 is more than max_replicas 2",
        ),
        ({"model": "m", "encoders": {"min_replicas": 0}}, "min_replicas"),
        ({"model": "m", "llm": {"num_gpus": -1}}, "num_gpus"),
        ({"model": "m", "encoders": {"settings": {"max_queue_s": 3}}}, "max_queue_s"),
        ({"model": "m", "encoders": {"settings": {"max_queued_s": -3}}}, "max_queued_s"),
        ({"model": "m", "encoders": {"settings": {"port": 1, "dp": 2}}}, "settings dp, port: leave them out"),
        ({"model": "m", "llm": {"settings": {"encoders": "a:1"}}}, "settings encoders: leave them out"),
        ({"model": "m", "llm": {"settings": {"transport": "rdma"}}}, "transport"),
        ({"model": "m", "gateway.retries": 3}, "retries"),
        ({"model": "m", "model.name": "n"}, "model.name leads into model"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        call_user_app_builder_with_args_if_necessary(build, arguments)  # type: ignore[arg-type]


def test_arguments_of_the_command_line_reach_the_deployments() -> None:
    made = deployments(
        {
            "model": "some/model",
            "encoders.num_gpus": "0.5",
            "encoders.max_replicas": "4",
            "encoders.target_queue_s": "1.5",
            "encoders.settings.quantization": "fp8",
            "llm.settings.drain_timeout_s": "60",
        }
    )
    assert sorted(made) == ["Encoder", "Gateway", "LlmWorker"]
    encoder = made["Encoder"]
    assert encoder.ray_actor_options["num_gpus"] == 0.5
    scaling = encoder._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.policy.policy_function == "vitrine_vlm.deploy.ray_serve.autoscaling.QueuedWork"
    queue, load = {"stat": "queue_seconds", "target": 1.5}, {"load_stat": "load", "target_load": 0.7}
    assert scaling.policy.policy_kwargs == queue | load
    scaling = made["LlmWorker"]._deployment_config.autoscaling_config
    queue = {"stat": "queued_prefill_tokens", "target": 8192}
    assert scaling.policy.policy_kwargs == queue | load
    router = encoder._deployment_config.request_router_config.request_router_class
    assert router == "vitrine_vlm.deploy.ray_serve.content_router.ContentRouter"
    assert made["LlmWorker"]._deployment_config.graceful_shutdown_timeout_s > 60


def test_settings_reach_the_services_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ServeArguments.model_validate(
        {
            "model": "some/model",
            "encoders": {"settings": {"cuda_graphs": False, "max_queued_s": 7, "allowed_media_folder": "/media"}},
            "llm": {"settings": {"max_model_len": 4096, "transport": "shm"}},
        }
    )
    for name, value in arguments.encoders.environment("some/model").items():
        monkeypatch.setenv(name, value)
    encoder = EncoderConfig.from_command_line([])
    assert (encoder.model, encoder.cuda_graphs, encoder.max_queued_s) == ("some/model", False, 7.0)
    assert encoder.allowed_media_folder == Path("/media")
    for name, value in arguments.llm.environment("some/model").items():
        monkeypatch.setenv(name, value)
    worker = LlmConfig.from_command_line(["--encoders", "here:1"])
    assert (worker.model, worker.max_model_len, worker.transport) == ("some/model", 4096, "shm")


def test_example_is_what_ray_serve_and_the_application_take() -> None:
    given = yaml.safe_load(EXAMPLE.read_text())
    schema = ServeDeploySchema.model_validate(given)
    [application] = schema.applications
    assert call_user_app_builder_with_args_if_necessary(import_attr(application.import_path), application.args)
    for function in schema.grpc_options.grpc_servicer_functions:
        assert callable(import_attr(function))
    # Ray Serve's schema drops misspelt keys.
    taken = schema.model_dump(exclude_unset=True)
    assert taken.keys() == given.keys()
    for part in ("http_options", "grpc_options"):
        assert taken[part].keys() == given[part].keys()
    assert taken["applications"][0].keys() == given["applications"][0].keys()


def test_serve_build_writes_a_file_that_ray_serve_takes(tmp_path: Path) -> None:
    file = tmp_path / "built.yaml"
    result = CliRunner().invoke(scripts.build, ["vitrine_vlm.deploy.ray_serve.tiny:app", "--output-path", str(file)])
    assert result.exit_code == 0, result.output
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications
    assert application.import_path == "vitrine_vlm.deploy.ray_serve.tiny:app"
    assert {each.name for each in application.deployments} == {"Encoder", "Gateway", "LlmWorker"}


@pytest.mark.parametrize(
    ("own", "num_on_node", "expected"),
    [([], 4, None), ([2], 4, "2,0,1,3"), (["0"], 1, "0"), ([0, 1], 4, "0,1,2,3"), (["MIG-1"], 4, None)],
)
def test_a_worker_runs_on_its_own_gpu_and_sees_the_others(
    own: list[int | str], num_on_node: int, expected: str | None
) -> None:
    assert gpu_environment(own, num_on_node).get("CUDA_VISIBLE_DEVICES") == expected


def test_the_smallest_application_fits_two_cpus() -> None:
    assert not shortages(ServeArguments(model="some/model").needed, {"CPU": 2.0})
    larger = ServeArguments.model_validate({"model": "some/model", "llm": {"num_cpus": 2, "num_gpus": 1}})
    assert [shortage.partition(":")[0] for shortage in shortages(larger.needed, {"CPU": 2.0})] == [
        "the application needs 3 CPUs, the cluster has 2",
        "the application needs 1 GPUs, the cluster has 0",
    ]


def test_which_of_the_replicas_without_a_process_are_to_stop() -> None:
    replicas = [{"actor_name": name, "state": state} for name, state in (("a", "STARTING"), ("b", "STOPPING"))]
    replicas.append({"actor_name": "has a process", "state": "STOPPING"})
    running = {"status": "RUNNING", "deployments": {"Encoder": {"replicas": replicas}}}
    assert stopping({"applications": {"vitrine": running}}, "vitrine", {"a", "b"}) == ["b"]
    deleting = {"status": "DELETING", "deployments": {}}  # as Ray Serve lists it then
    assert stopping({"applications": {"vitrine": deleting}}, "vitrine", {"a", "b"}) == ["a", "b"]
    assert stopping({"applications": {}}, "vitrine", {"a"}) == ["a"]
