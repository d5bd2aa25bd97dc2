"""Settings of who may call a service that users call, and in whose name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, SecretStr, field_validator

from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.api_keys import ApiKey, ApiKeys, key_hash
from vitrine_vlm.service_runtime.api_keys_file import KeysFile
from vitrine_vlm.service_runtime.key_metrics import KeyMetrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_KEY = re.compile(r"[!-+\--~]{16,256}")  # visible ASCII without the comma


class AccessSettings(BaseModel):
    """A base for settings."""

    # Excluded: it is in no printed configuration, and other processes of the service need none.
    api_key: SecretStr = Field(
        SecretStr(""),
        exclude=True,
        description="keys that users must send as `Authorization: Bearer KEY`, separated by commas; on a command line "
        "other users of the machine see them, in the environment they do not; none: see --api-keys-file",
    )
    api_keys_file: Path | None = Field(
        None,
        description="YAML or JSON file of keys' hashes, tenants and limits, read again when it changes; without keys "
        "here and in --api-key none are needed",
    )
    tenant_header: str | None = Field(
        None,
        description="request header with the tenant of requests whose key has none, which what stands in front must "
        "set or remove; none: they have none",
    )

    @field_validator("api_key")
    @classmethod
    def _check_keys(cls, keys: SecretStr) -> SecretStr:
        if any(not _KEY.fullmatch(key) for key in _split(keys)):
            raise ValueError("a key must be 16 to 256 visible ASCII characters: make one by `openssl rand -hex 32`")
        return keys

    @field_validator("tenant_header")
    @classmethod
    def _check_header(cls, name: str | None) -> str | None:
        if name is not None and not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a header")
        return name

    def make_access(self, registry: CollectorRegistry, metrics_prefix: str, tenant: str = "") -> Access:
        """
        Args:
            metrics_prefix: of the names of keys' metrics.
            tenant: of requests whose key and header state none.

        Raises:
            OSError: the file cannot be read.
            ValueError: what is wrong in it.
        """
        header = self.tenant_header.lower() if self.tenant_header is not None else None
        given = {key_hash(key): ApiKey(f"api-key-{number}") for number, key in enumerate(_split(self.api_key), 1)}
        if not given and self.api_keys_file is None:
            return Access(tenant_header=header, tenant=tenant)
        keys = ApiKeys(given, KeyMetrics(registry, metrics_prefix))
        file: KeysFile | None = None
        if self.api_keys_file is not None:
            file = KeysFile(self.api_keys_file, lambda found: keys.replace(given | found))
            file.load()
        return Access(keys, file, header, tenant)


def _split(keys: SecretStr) -> list[str]:
    return [key.strip() for key in keys.get_secret_value().split(",") if key.strip()]
