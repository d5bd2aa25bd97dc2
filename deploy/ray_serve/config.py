"""The application's arguments, checked before anything starts: Ray Serve's own schema accepts misspelt keys."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.service_runtime.settings import ServiceSettings

# Each replica chooses its own addresses, and they connect to each other without TLS.
_CHOSEN_HERE = frozenset(
    [
        *("model", "host", "port", "config", "print_config", "tls_cert_file", "tls_key_file", "tls_client_ca_file"),
        *("metrics_host", "metrics_port", "metrics_client_auth"),
    ]
)
_ENCODER_TLS = frozenset(["encoder_ca_file", "encoder_cert_file", "encoder_key_file"])


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pool(_Strict):
    """Replicas of one kind, each with its own service process."""

    chosen_here: ClassVar[frozenset[str]] = _CHOSEN_HERE

    settings: dict[str, Any] = Field(default={}, description="of the service, named as in its --config file")
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    # Together with the gateway's less than 2 CPUs, the least that most machines have.
    num_cpus: float = Field(default=0.5, gt=0, description="of a replica")
    num_gpus: float = Field(default=0.0, ge=0, description="of a replica; 0.5 puts two on one")
    look_back_s: float = Field(default=10.0, gt=0, description="seconds over which queues are averaged")
    upscale_delay_s: float = Field(default=5.0, ge=0, description="seconds of long queues before replicas are added")
    downscale_delay_s: float = Field(default=300.0, ge=0, description="seconds of short queues before some are removed")
    health_check_period_s: float = Field(default=2.0, gt=0, description="three failures in a row replace a replica")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self

    @abstractmethod
    def service_settings(self, model: str) -> ServiceSettings:
        """Returns the settings of the service, without those that each replica chooses itself.

        Raises:
            ValueError: a setting is unknown, out of range, or chosen by the replicas.
        """

    def environment(self, model: str) -> dict[str, str]:
        """Returns the given settings as environment variables; raises the errors of `service_settings`."""
        service_settings = self.service_settings(model)
        given = service_settings.model_dump(mode="json", include={"model", *self.settings}, exclude_none=True)
        return environment_variables(type(service_settings), given)

    def _given(self, model: str) -> dict[str, Any]:
        wrong = sorted(self.chosen_here & self.settings.keys())
        if wrong:
            raise ValueError(f"settings {', '.join(wrong)}: leave them out, the application chooses them")
        return {"model": model, **self.settings}


class EncoderPool(Pool):
    chosen_here = _CHOSEN_HERE | {"dp"}

    target_queue_s: float = Field(default=2.0, gt=0, description="queued work that a replica should have, s")
    target_load: float = Field(
        default=0.7, gt=0, le=1, description="part of time that a replica's tower should compute"
    )

    def service_settings(self, model: str) -> EncoderConfig:
        return EncoderConfig(**self._given(model))


class LlmPool(Pool):
    chosen_here = _CHOSEN_HERE | _ENCODER_TLS | {"grpc_port", "encoders", "role", "prefill_workers"}

    target_queued_tokens: int = Field(default=8192, ge=1, description="of prompts, that a replica should have queued")
    target_load: float = Field(default=0.7, gt=0, description="vitrine_llm_load that a replica should have")

    def service_settings(self, model: str) -> LlmConfig:
        if "api_key" in self.settings:
            raise ValueError("setting api_key: Ray's dashboard shows arguments; use api_keys_file, which has hashes")
        return LlmConfig(encoders="127.0.0.1:1", **self._given(model))  # a placeholder: the encoders do not exist yet


class GatewaySettings(_Strict):
    """Settings of the gateway between Ray Serve's proxies and the replicas."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, gt=0, description="of a replica")
    retry_s: float = Field(
        default=60.0, ge=0, description="seconds that a request waits for another replica if one dies"
    )


class ServeArguments(_Strict):
    """Arguments of the application. On the command line nested ones have dots, as in `encoders.num_gpus=1`."""

    model: str = Field(description="checkpoint folder or hub id, such as Qwen/Qwen3-VL-2B-Instruct")
    encoders: EncoderPool = EncoderPool()
    llm: LlmPool = LlmPool()
    gateway: GatewaySettings = GatewaySettings()

    @property
    def needed(self) -> dict[str, float]:
        """What the fewest replicas need together of Ray's resources."""
        pools = (self.encoders, self.llm)
        num_cpus = sum(pool.min_replicas * pool.num_cpus for pool in pools)
        return {
            "CPU": num_cpus + self.gateway.num_replicas * self.gateway.num_cpus,
            "GPU": sum(pool.min_replicas * pool.num_gpus for pool in pools),
        }

    @model_validator(mode="before")
    @classmethod
    def _expand_dots(cls, arguments: Any) -> Any:
        if not isinstance(arguments, Mapping):
            return arguments
        expanded: dict[str, Any] = {}
        for name, value in arguments.items():
            *parts, last = name.split(".")
            inner = expanded
            for part in parts:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    raise ValueError(f"{name} leads into {part}, which is {inner!r} and has no parts")
            inner[last] = value
        return expanded

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        self.encoders.service_settings(self.model)
        self.llm.service_settings(self.model)
        return self


def environment_variables(service: type[ServiceSettings], values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the environment variables from which `service` reads these settings."""
    prefix = service.model_config.get("env_prefix", "")
    return {
        f"{prefix}{name}".upper(): value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }
