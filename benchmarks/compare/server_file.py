"""What a YAML file says about a server: how it is started, when it is ready, which version it is."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SHIPPED = Path(__file__).with_name("servers")

# Braces of JSON and of a shell's ${NAME} are left alone.
_PLACEHOLDER = re.compile(r"(?<!\$)\{([a-z_]+)\}")

Command = str | list[str]  # a string is a shell's


class InvalidServerFile(ValueError):
    """The file cannot be read, or does not describe a server."""


class ProcessSpec(BaseModel):
    """One process of a server. `environment` is added to that of the comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "server"
    command: Command
    environment: dict[str, str] = Field(default_factory=dict)


class ServerSpec(BaseModel):
    """A server: one or several processes, started together.

    Commands, URLs and values of `environment` may have placeholders in braces: those that the comparison's command line
    gives (`{model}`, `{load_format}`, `{python}`), and any name that ends with `port`, which is a free port: the same
    one wherever the name stands. The HTTP port that is measured is `{port}`.

    ready: path that answers 200 once requests are taken; also_ready: URLs that must, too: of servers behind a front.
    version: a command whose output says the server's version.
    stop_grace_s: seconds between SIGTERM and SIGKILL.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    processes: list[ProcessSpec] = Field(min_length=1)
    ready: str = "/v1/models"
    also_ready: list[str] = Field(default_factory=list)
    ready_timeout_s: float = 900.0
    version: Command | None = None
    stop_grace_s: float = 15.0

    @classmethod
    def read(cls, file: str) -> ServerSpec:
        """Reads a YAML file, or the one of that name that is shipped along.

        Raises:
            InvalidServerFile: there is none, or it describes no server.
        """
        import yaml  # where figures are only shown, it need not be installed

        path = Path(file)
        if not path.suffix and not path.exists():
            path = SHIPPED / f"{file}.yaml"
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except FileNotFoundError as error:
            names = (each.relative_to(SHIPPED).with_suffix("") for each in SHIPPED.rglob("*.yaml"))
            shipped = ", ".join(sorted(map(str, names)))
            raise InvalidServerFile(f"there is no file {file}; shipped along are: {shipped}") from error
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise InvalidServerFile(f"{path}: {error}") from error

    def filled(self, values: Mapping[str, str]) -> ServerSpec:
        """Returns the same with placeholders filled in.

        Raises:
            InvalidServerFile: one of them is not in `values`.
        """

        def fill(text: str) -> str:
            return _PLACEHOLDER.sub(lambda match: self._value(match[1], values), text)

        def fill_command(command: Command) -> Command:
            return fill(command) if isinstance(command, str) else [fill(each) for each in command]

        processes = [
            each.model_copy(
                update={
                    "command": fill_command(each.command),
                    "environment": {name: fill(value) for name, value in each.environment.items()},
                }
            )
            for each in self.processes
        ]
        version = None if self.version is None else fill_command(self.version)
        also_ready = [fill(each) for each in self.also_ready]
        return self.model_copy(update={"processes": processes, "version": version, "also_ready": also_ready})

    def port_names(self) -> set[str]:
        """Returns the placeholders of ports, `port` among them."""
        texts = [text for each in self.processes for text in (*argv(each.command), *each.environment.values())]
        return {name for text in texts for name in _PLACEHOLDER.findall(text) if name.endswith("port")} | {"port"}

    def _value(self, name: str, values: Mapping[str, str]) -> str:
        if name not in values:
            known = ", ".join(f"{{{each}}}" for each in values)
            raise InvalidServerFile(f"{self.name}: {{{name}}} has no value; known here: {known}")
        return values[name]


def argv(command: Command) -> list[str]:
    """Returns the program and its arguments."""
    return ["/bin/sh", "-c", command] if isinstance(command, str) else command


def free_ports(names: Sequence[str]) -> dict[str, str]:
    """Returns a free TCP port of 127.0.0.1 for each name."""
    sockets = [socket.socket() for _ in names]
    try:
        for each in sockets:  # all are bound at the same time, so that no port is returned twice
            each.bind(("127.0.0.1", 0))
        return {name: str(each.getsockname()[1]) for name, each in zip(names, sockets, strict=True)}
    finally:
        for each in sockets:
            each.close()
