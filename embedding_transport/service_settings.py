"""Settings and start of a service process: flags win over the environment, which wins over defaults."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from embedding_transport.checkpoint import CheckpointError
from embedding_transport.errors import VitrineError


class ServiceSettings(BaseSettings):
    """Base of a service's settings; subclasses set `env_prefix` and `cli_prog_name`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        # Fields such as model_name are ours, not pydantic's.
        protected_namespaces=(),
    )

    @classmethod
    def from_command_line(cls, arguments: Sequence[str]) -> Self:
        """Reads flags and environment.

        Raises:
            SystemExit: --help, or an unknown or malformed flag.
            pydantic.ValidationError: a value is missing or out of range.
        """
        return cls(_cli_parse_args=list(arguments))  # type: ignore[call-arg]


SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


def run_service(settings: type[SettingsT], serve: Callable[[SettingsT], Coroutine[Any, Any, None]]) -> int:
    """Runs a service; returns 0 after an orderly stop, 1 where it could not start, 2 for bad settings."""
    try:
        config = settings.from_command_line(sys.argv[1:])
    except ValidationError as error:
        for problem in error.errors():
            flag = "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            print(f"{flag}: {problem['msg']}; see --help", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(serve(config))
    except (CheckpointError, OSError, ValueError, VitrineError) as error:
        logging.getLogger(__name__).error("cannot start: %s", error)
        return 1
    return 0
