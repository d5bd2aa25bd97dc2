"""The Ray Serve application: `serve run vitrine_vlm.deploy.ray_serve.application:build model=...`, or a YAML file."""

# No `from __future__ import annotations`: Ray Serve reads that of `build` to check the arguments.

import logging
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from vitrine_vlm.deploy.ray_serve.autoscaling import QueuedWork
from vitrine_vlm.deploy.ray_serve.config import Pool, ServeArguments
from vitrine_vlm.deploy.ray_serve.content_router import ContentRouter
from vitrine_vlm.deploy.ray_serve.encoder import QUEUE_SECONDS, EncoderReplica
from vitrine_vlm.deploy.ray_serve.gateway import Gateway
from vitrine_vlm.deploy.ray_serve.llm import QUEUED_TOKENS, LlmReplica

_log = logging.getLogger("ray.serve")

# The services themselves refuse requests above their capacity, with a time after which to retry.
_MAX_ONGOING_REQUESTS = 100_000
# On top of the time that a service may take to drain.
_STOP_MARGIN_S = 5.0


def build(arguments: ServeArguments) -> serve.Application:
    """Builds encoders, LLM workers, and the gateway in front of both."""
    _warn_of_missing_resources(arguments)
    model, encoders, llm, gateway = arguments.model, arguments.encoders, arguments.llm, arguments.gateway
    encoder_settings, llm_settings = encoders.service_settings(model), llm.service_settings(model)

    grace_s = encoder_settings.drain_timeout_s + _STOP_MARGIN_S
    options = _options(encoders, QUEUE_SECONDS, encoders.target_queue_s, grace_s)
    encoder = serve.deployment(name="Encoder", **options)(EncoderReplica)
    bound_encoder = encoder.bind(encoders.environment(model), grace_s)

    grace_s = llm_settings.drain_timeout_s + _STOP_MARGIN_S
    options = _options(llm, QUEUED_TOKENS, llm.target_queued_tokens, grace_s)
    worker = serve.deployment(name="LlmWorker", **options)(LlmReplica)
    bound_worker = worker.bind(llm.environment(model), grace_s, bound_encoder)

    ingress = serve.deployment(
        name="Gateway",
        num_replicas=gateway.num_replicas,
        ray_actor_options={"num_cpus": gateway.num_cpus},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
    )(Gateway)
    keys_file = str(llm_settings.api_keys_file) if llm_settings.api_keys_file is not None else None
    return ingress.bind(
        bound_encoder,
        bound_worker,
        encoder_settings.max_items,
        gateway.retry_s,
        keys_file,
        llm_settings.tenant_header,
    )


def _warn_of_missing_resources(arguments: ServeArguments) -> None:
    """Logs at once why replicas will wait, which Ray Serve says after half a minute, and not of how much."""
    if not ray.is_initialized():  # a file is built
        return
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, needed in arguments.needed.items():
        if needed > there.get(name, 0.0):
            _log.warning(
                "the application needs %g %ss, the cluster has %g: replicas wait until nodes are added; lower num_%ss",
                needed,
                name,
                there.get(name, 0.0),
                name.lower(),
            )


def _options(pool: Pool, stat: str, target: float, stop_grace_s: float) -> dict[str, Any]:
    policy = {"policy_function": QueuedWork, "policy_kwargs": {"stat": stat, "target": target}}
    return {
        "ray_actor_options": {
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            # A replica's event loop starts processes by fork(), whose handlers in gRPC can abort the new process.
            "runtime_env": {"env_vars": {"GRPC_ENABLE_FORK_SUPPORT": "0"}},
        },
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=pool.min_replicas,
            max_replicas=pool.max_replicas,
            look_back_period_s=pool.look_back_s,
            # Deprecated in favor of environment variables which Ray 2.60 does not read.
            metrics_interval_s=pool.look_back_s / 5,
            upscale_delay_s=pool.upscale_delay_s,
            downscale_delay_s=pool.downscale_delay_s,
            policy=AutoscalingPolicy(**policy),  # type: ignore[no-untyped-call]
        ),
        "request_router_config": {"request_router_class": ContentRouter},
        "health_check_period_s": pool.health_check_period_s,
        # Ray Serve first waits for requests in flight, then for the replica's __del__, all within this time.
        "graceful_shutdown_timeout_s": 2 * stop_grace_s,
        "logging_config": {"enable_access_log": False},  # LLM workers request addresses every second
    }
