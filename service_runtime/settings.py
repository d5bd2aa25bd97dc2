"""Settings and start of a service process. Flags override the environment, which overrides a file and the defaults."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict

from vitrine_vlm import __version__
from vitrine_vlm.service_runtime.http_log import shorten_bad_requests
from vitrine_vlm.service_runtime.lifecycle import exit_now
from vitrine_vlm.service_runtime.log_limits import printable
from vitrine_vlm.service_runtime.logs import LogFormat, LogLevel, start_logging
from vitrine_vlm.service_runtime.memory import reuse_message_memory
from vitrine_vlm.service_runtime.open_files import raise_open_files_limit
from vitrine_vlm.service_runtime.port_limits import MAX_BODY_BYTES, MIB, PortLimits
from vitrine_vlm.service_runtime.supervisor import ServiceFailed
from vitrine_vlm.service_runtime.threads import set_switch_interval
from vitrine_vlm.service_runtime.tls import ServerTls
from vitrine_vlm.service_runtime.traces import start_tracing


class ServiceSettings(BaseSettings):
    """The base of a service's settings; subclasses set `env_prefix`, `cli_prog_name` and `service_name`."""

    service_name: ClassVar[str]

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        # Fields such as model_name are allowed.
        protected_namespaces=(),
    )

    config: Path | None = Field(None, description="YAML file with settings, named as here with underscores")
    print_config: bool = Field(
        False, description="print the settings in force as such a file, each with where it is from, and end"
    )
    tls_cert_file: Path | None = Field(None, description="certificate chain (PEM) to serve with; none: no TLS")
    tls_key_file: Path | None = Field(None, description="its private key (PEM)")
    tls_client_ca_file: Path | None = Field(
        None, description="CA of clients' certificates (PEM), which are then required"
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port of its own for Prometheus metrics, and for a worker's dashboard; 0: on the HTTP port, of an "
        "encoder, which has none, nowhere",
    )
    metrics_host: str | None = Field(None, description="address of that port; none: --host")
    metrics_client_auth: bool = Field(
        True, description="with --tls-client-ca-file: that port requires certificates of clients, too"
    )
    health_socket: Path | None = Field(
        None, description="Unix socket where the gRPC health service answers, too, without TLS; none: no such socket"
    )
    max_body_bytes: int = Field(
        MAX_BODY_BYTES, ge=1024, description="largest request, an HTTP body or a gRPC message, bytes"
    )
    max_held_bytes: int = Field(
        2048 * MIB,
        ge=1,
        description="requests, media and unread replies in memory before more are refused as overload, bytes",
    )
    client_timeout_s: float = Field(
        30.0,
        gt=0,
        description="longest wait for a client: for a request's head, for its body to go on, for a reply to be read, s",
    )
    max_connections: int = Field(4096, ge=1, description="open connections of one port")
    max_client_connections: int = Field(2048, ge=1, description="of these, or calls over gRPC, from one address")
    log_level: LogLevel = Field("info", description="least severe messages to log")
    log_format: LogFormat = Field("text", description="json: one object a line")
    otlp_endpoint: str = Field(
        "", description="collector for traces, http(s)://host:port (OTLP over gRPC); empty: none"
    )

    # Of settings that are no defaults.
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_metrics_port(self) -> Self:
        if self.metrics_host is not None and not self.metrics_port:
            raise ValueError(f"--metrics-host {self.metrics_host} needs --metrics-port")
        return self

    @classmethod
    def from_command_line(cls, arguments: Sequence[str]) -> Self:
        """Reads the flags, the environment and the file that either of them names.

        Raises:
            SystemExit: --help, --version, or an unknown or malformed flag.
            ValueError: the file cannot be read, or the environment has an unknown setting.
            pydantic.ValidationError: a value is missing or out of range, or the file has an unknown key.
        """
        file = cls._config_file(arguments)
        in_file: Any = {}
        if file:
            with file.open() as stream:  # a stream, because YAML's errors then name the file
                in_file = yaml.safe_load(stream)
        if not isinstance(in_file, dict):
            raise ValueError(f"--config {file}: it must hold settings as `name: value`, not a {type(in_file).__name__}")
        in_environment = EnvSettingsSource(cls)()
        given = {name: value for name, value in in_file.items() if name not in in_environment}
        flags: CliSettingsSource[Any] = CliSettingsSource(cls)
        flags.root_parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        in_flags = flags(args=list(arguments))
        settings = cls(_cli_settings_source=in_flags, **given)
        cls._check_environment()
        prefix = cls.model_config.get("env_prefix", "")
        settings._sources.update(dict.fromkeys(in_file, f"file {file}"))
        settings._sources.update({name: f"environment {prefix}{name.upper()}" for name in in_environment})
        settings._sources.update({name: f"flag --{name.replace('_', '-')}" for name in in_flags()})
        return settings

    @classmethod
    def _check_environment(cls) -> None:
        """Refuses unknown variables with the prefix, which pydantic ignores."""
        prefix = cls.model_config.get("env_prefix", "")
        prefixed = [name for name in os.environ if name.upper().startswith(prefix)]
        if unknown := sorted(name for name in prefixed if name[len(prefix) :].lower() not in cls.model_fields):
            raise ValueError(f"{', '.join(unknown)}: no such settings in the environment; see --help")

    @classmethod
    def _config_file(cls, arguments: Sequence[str]) -> Path | None:
        """Returns the file that --config or the environment names; it is needed before the other settings are read."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config", default=os.environ.get(f"{cls.model_config.get('env_prefix', '')}CONFIG"))
        name = parser.parse_known_args(arguments)[0].config
        if name and not Path(name).is_file():
            raise ValueError(f"--config {name}: there is no such file")
        return Path(name) if name else None

    def server_tls(self) -> ServerTls | None:
        """Returns the TLS settings of the ports, or None without TLS.

        Raises:
            ValueError: certificate and key are not given together, or a CA is given without them.
        """
        cert_file, key_file, client_ca_file = self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file
        if cert_file and key_file:
            return ServerTls(cert_file, key_file, client_ca_file)
        if cert_file or key_file or client_ca_file:
            raise ValueError("TLS needs both --tls-cert-file and --tls-key-file")
        return None

    def metrics_tls(self) -> ServerTls | None:
        """Returns the TLS settings of the metrics port, or None without TLS.

        Raises:
            ValueError: see `server_tls`.
        """
        tls = self.server_tls()
        return tls if tls is None or self.metrics_client_auth else replace(tls, client_ca_file=None)

    def port_limits(self) -> PortLimits:
        return PortLimits(self.max_body_bytes, self.client_timeout_s, self.max_connections, self.max_client_connections)

    def as_yaml(self) -> str:
        """Returns the settings as a file for `--config`, in which a comment says where each value is from."""
        own = self.model_dump(mode="json", exclude={"config", "print_config"})
        lines = []
        for name, value in own.items():
            # A value of several lines has its comment in front.
            text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=math.inf).rstrip("\n")
            source = printable(self._sources.get(name, "default"))
            lines.append(f"# {source}\n{text}" if "\n" in text else f"{text}  # {source}")
        return "\n".join(lines) + "\n"

    def as_environment(self, **changed: object) -> dict[str, str]:
        """Returns environment variables that give another process the same settings, except for those in `changed`.

        Defaults are included: a file that this process's environment names must not override them.
        """
        own = self.model_dump(mode="json", exclude_none=True, exclude={"config", "print_config"}) | changed
        prefix = self.model_config.get("env_prefix", "")
        return {f"{prefix}{name}".upper(): str(value) for name, value in own.items()}


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def run_service(
    settings: type[SettingsT],
    serve: Callable[[SettingsT], Coroutine[Any, Any, None]],
    failures: tuple[type[Exception], ...],
) -> int:
    """Runs a service, and ends the process: with 0 after an orderly stop, 1 after a failure.

    Returns 1 where it could not start, 2 for bad settings, 0 after --print-config.

    Args:
        failures: errors that are logged without a traceback, besides OSError and ValueError.
    """
    try:
        config = settings.from_command_line(sys.argv[1:])
    except ValidationError as error:
        for problem in error.errors():
            flag = "".join(f"--{part}: " for part in problem["loc"]).replace("_", "-")
            print(f"{flag}{problem['msg']}; see --help", file=sys.stderr)
        return 2
    except (ValueError, yaml.YAMLError) as error:
        print(error, file=sys.stderr)
        return 2
    if config.print_config:
        print(config.as_yaml(), end="")
        return 0
    start_logging(config.log_level, config.log_format)
    shorten_bad_requests()
    reuse_message_memory()
    raise_open_files_limit()
    set_switch_interval()
    expected: tuple[type[Exception], ...] = (OSError, ValueError, *failures)
    end_tracing = start_tracing(settings.service_name, config.otlp_endpoint)
    status = 0
    try:
        asyncio.run(serve(config))
    except ServiceFailed as error:
        logging.getLogger(__name__).error("the service ends: %s", error)
        status = 1
    except expected as error:
        logging.getLogger(__name__).error("cannot start: %s", error)
        return 1
    finally:
        end_tracing()
    exit_now(status)
