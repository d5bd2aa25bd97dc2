"""The Ray Serve application: `serve run vitrine_vlm.deploy.ray_serve.application:build model=...`, or a YAML file."""

# No `from __future__ import annotations`: Ray Serve reads that of `build` to check the arguments.

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from vitrine_vlm.deploy.ray_serve.autoscaling import LOAD, QueuedWork
from vitrine_vlm.deploy.ray_serve.config import Pool, ServeArguments
from vitrine_vlm.deploy.ray_serve.content_router import ContentRouter
from vitrine_vlm.deploy.ray_serve.encoder import QUEUE_SECONDS, EncoderReplica
from vitrine_vlm.deploy.ray_serve.gateway import Gateway
from vitrine_vlm.deploy.ray_serve.llm import QUEUED_TOKENS, LlmReplica
from vitrine_vlm.deploy.ray_serve.service_log import logging_config

# The services themselves refuse requests above their capacity, with a time after which to retry.
_MAX_ONGOING_REQUESTS = 100_000
# On top of the time that a service may take to drain.
_STOP_MARGIN_S = 5.0


def build(arguments: ServeArguments) -> serve.Application:
    """Builds encoders, LLM workers, and the gateway in front of both."""
    model, encoders, llm, gateway = arguments.model, arguments.encoders, arguments.llm, arguments.gateway
    encoder_settings, llm_settings = encoders.service_settings(model), llm.service_settings(model)

    grace_s = encoder_settings.drain_timeout_s + _STOP_MARGIN_S
    policy = {"stat": QUEUE_SECONDS, "target": encoders.target_queue_s}
    options = _options(encoders, {**policy, "load_stat": LOAD, "target_load": encoders.target_load}, grace_s)
    encoder = serve.deployment(name="Encoder", **options)(EncoderReplica)
    bound_encoder = encoder.bind(encoders.environment(model), grace_s, arguments.needed)

    grace_s = llm_settings.drain_timeout_s + _STOP_MARGIN_S
    policy = {"stat": QUEUED_TOKENS, "target": llm.target_queued_tokens}
    options = _options(llm, {**policy, "load_stat": LOAD, "target_load": llm.target_load}, grace_s)
    worker = serve.deployment(name="LlmWorker", **options)(LlmReplica)
    bound_worker = worker.bind(llm.environment(model), grace_s, arguments.needed, bound_encoder)

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
        arguments.needed,
    )


def _options(pool: Pool, targets: dict[str, Any], stop_grace_s: float) -> dict[str, Any]:
    policy = {"policy_function": QueuedWork, "policy_kwargs": targets}
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
        "logging_config": logging_config(pool.settings),
    }
