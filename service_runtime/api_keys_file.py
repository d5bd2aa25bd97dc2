"""The file of API keys: YAML or JSON, read again when it has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vitrine_vlm.service_runtime.api_keys import ApiKey

MAX_TENANT_LENGTH = 256
_INTERVAL_S = 1.0

_log = logging.getLogger(__name__)


class _Entry(BaseModel):
    """A key. tenant: "" lets a trusted header set it, and shares caches with all requests that have none."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{64}$")]
    tenant: Annotated[str, StringConstraints(max_length=MAX_TENANT_LENGTH)]
    requests_per_minute: float | None = Field(None, gt=0)
    media_bytes_per_minute: float | None = Field(None, gt=0)
    max_in_flight: int | None = Field(None, ge=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: list[_Entry]


def parse_keys(content: bytes) -> dict[bytes, ApiKey]:
    """Returns the keys of a file, by their hashes.

    Raises:
        ValueError: it is no YAML, a field is missing, unknown or out of range, or two keys have one name or hash.
            The message has no value of the file, which may be a key that was put there instead of its hash.
    """
    try:
        entries = _File.model_validate(yaml.safe_load(content)).keys
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        raise ValueError(f"it is no YAML{f', see line {where.line + 1}' if where else ''}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    keys: dict[bytes, ApiKey] = {}
    names: set[str] = set()
    for entry in entries:
        digest = bytes.fromhex(entry.sha256)
        if entry.name in names or digest in keys:
            raise ValueError(f"the name or the hash of {entry.name} is there twice: give each key its own")
        names.add(entry.name)
        keys[digest] = ApiKey(**entry.model_dump(exclude={"sha256"}))
    return keys


class KeysFile:
    """A file of keys, and what it had when it was last read.

    Args:
        use: called with the keys of the file, on the event loop; first by `load`.
    """

    def __init__(self, file: Path, use: Callable[[dict[bytes, ApiKey]], None]) -> None:
        self._file = file
        self._use = use
        self._content: bytes | None = None
        self._problem = ""

    def load(self) -> None:
        """
        Raises:
            OSError: the file cannot be read.
            ValueError: see `parse_keys`.
        """
        content = self._file.read_bytes()
        self._content = content
        try:
            self._use(parse_keys(content))
        except ValueError as error:
            raise ValueError(f"--api-keys-file {self._file}: {error}") from None

    async def watch(self, interval_s: float = _INTERVAL_S) -> None:
        """Uses the keys of the file whenever it has changed. While it cannot be used, the keys stay as they were."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                content = await asyncio.to_thread(self._file.read_bytes)
                if content == self._content:
                    continue
                self._content = content
                keys = await asyncio.to_thread(parse_keys, content)
            except (OSError, ValueError) as error:
                if str(error) != self._problem:
                    _log.error("API keys stay as they were: %s: %s", self._file, error)
                self._problem = str(error)
                continue
            self._problem = ""
            self._use(keys)
            _log.info("read %d API keys from %s", len(keys), self._file)
