"""Settings of a gateway: flags win over the environment (VITRINE_GATEWAY_*), which wins over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from vitrine_vlm.embedding_transport.clients.settings import EncoderFleetSettings
from vitrine_vlm.embedding_transport.fleet.discovery import parse_sources
from vitrine_vlm.service_runtime.access_settings import AccessSettings
from vitrine_vlm.service_runtime.settings import ServiceSettings
from vitrine_vlm.service_runtime.tls import ClientTls


class GatewayConfig(ServiceSettings, AccessSettings, EncoderFleetSettings):
    """Vitrine's gateway: an OpenAI front before vLLM servers that get embeddings from Vitrine's encoders, or before
    Vitrine's own LLM workers.
    """

    service_name = "vitrine-gateway"
    model_config = SettingsConfigDict(env_prefix="VITRINE_GATEWAY_", cli_prog_name="vitrine-gateway")

    servers: str = Field(description="HTTP addresses of the vLLM servers or LLM workers, in the forms of --encoders")
    server_ca_file: Path | None = Field(None, description="CA that signs servers' certificates (PEM); none: no TLS")
    server_cert_file: Path | None = Field(None, description="certificate (PEM) for servers that ask for one")
    server_key_file: Path | None = Field(None, description="its private key (PEM)")
    server_name: str | None = Field(
        None, description="name in servers' certificates, where they are reached by another one or by IP address"
    )
    server_timeout_s: float = Field(
        600.0, gt=0, description="longest wait for the next bytes of a server's answer, also for its first ones, s"
    )
    health_path: str = Field(
        "/health", pattern="^/", description="what a server is asked for its health; of LLM workers: /ready"
    )
    health_interval_s: float = Field(2.0, gt=0, description="time between two health checks of a server, s")
    max_in_flight: int = Field(
        1024, ge=1, description="requests in flight at one server; more are refused with 429 once all servers have them"
    )

    tenant: str = Field(
        "",
        description="tenant of requests whose key and header state none: encoders and servers share embeddings within "
        "one only",
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8080, ge=0, le=65535, description="HTTP port; 0 takes a free one, see the LISTENING line")
    grpc_port: int = Field(50053, ge=0, le=65535, description="port of the gRPC health service; 0 takes a free one")
    drain_timeout_s: float = Field(30.0, ge=0, description="longest wait for running requests at shutdown, s")
    max_items: int = Field(64, ge=0, description="images and videos accepted in one request")

    @field_validator("servers")
    @classmethod
    def _check_servers(cls, specs: str) -> str:
        parse_sources(specs)
        return specs

    @model_validator(mode="after")
    def _check_tls_to_servers(self) -> Self:
        given = [name for name in ("cert_file", "key_file", "name") if getattr(self, f"server_{name}") is not None]
        if given and self.server_ca_file is None:
            raise ValueError(f"server_{given[0]} needs server_ca_file: without it there is no TLS to servers")
        if (self.server_cert_file is None) != (self.server_key_file is None):
            raise ValueError("server_cert_file and server_key_file need each other")
        return self

    def tls_to_servers(self) -> ClientTls | None:
        if self.server_ca_file is None:
            return None
        return ClientTls(self.server_ca_file, self.server_cert_file, self.server_key_file, self.server_name)
