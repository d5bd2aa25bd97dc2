"""Settings of a client of encoders, which several services have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from vitrine_vlm.embedding_transport.fleet.discovery import parse_sources
from vitrine_vlm.service_runtime.tls import ClientTls


class EncoderFleetSettings(BaseModel):
    """Where encoders are, and how to connect to them. A base for settings; it needs pydantic."""

    encoders: str = Field(
        "",
        description="encoders to use, separated by commas: host:port, host:first-last (of --dp), dns:NAME:PORT, "
        "file:PATH with an address a line, or kubernetes:NAMESPACE/SERVICE:PORT",
    )
    connect_timeout_s: float = Field(
        5.0, gt=0, description="for each step of connecting to an encoder or prefill worker, s"
    )
    encode_timeout_s: float = Field(
        300.0, gt=0, description="longest work on one request of one encoder or prefill worker, s"
    )
    encoder_ca_file: Path | None = Field(None, description="CA that signs encoders' certificates (PEM); none: no TLS")
    encoder_cert_file: Path | None = Field(None, description="certificate (PEM) for encoders that ask for one")
    encoder_key_file: Path | None = Field(None, description="its private key (PEM)")
    encoder_server_name: str | None = Field(
        None, description="name in encoders' certificates, where they are reached by another one or by IP address"
    )

    @field_validator("encoders")
    @classmethod
    def _check_encoders(cls, specs: str) -> str:
        if specs:
            parse_sources(specs)
        return specs

    def encoder_tls(self) -> ClientTls | None:
        """
        Raises:
            ValueError: a certificate without its key, or without a CA to check the other side with.
        """
        ca_file, cert_file, key_file = self.encoder_ca_file, self.encoder_cert_file, self.encoder_key_file
        if (cert_file is None) != (key_file is None) or (cert_file and not ca_file):
            raise ValueError("--encoder-cert-file needs --encoder-key-file and --encoder-ca-file beside it")
        return ClientTls(ca_file, cert_file, key_file, self.encoder_server_name) if ca_file else None


class EncoderSettings(EncoderFleetSettings):
    """The same, and how embeddings come from them."""

    transport: Literal["auto", "cuda_ipc", "shm", "grpc"] = Field(
        "auto",
        description="how embeddings come: cuda_ipc or shm (same host), or grpc (bytes); auto: the first that works",
    )
    shm_folder: str = Field("/dev/shm", description="shared-memory folder, the same as the other side's")
