"""The tenant of the request that the current task serves, and what caches may share: one tenant's things only."""

from __future__ import annotations

import hashlib
import struct
from contextvars import ContextVar
from dataclasses import dataclass

# Of a salt, characters.
MAX_SALT_LENGTH = 1024

_tenant: ContextVar[str] = ContextVar("tenant", default="")

# Eight bytes that are no token id: no salt makes the digest equal to the hash of a block of tokens.
_TAG = b"\xffscope\x00\xff"
_LENGTH = struct.Struct("<q")


def set_tenant(tenant: str) -> None:
    """Sets the tenant of the current task and of the tasks that it starts from now on."""
    _tenant.set(tenant)


def current_tenant() -> str:
    """Returns the tenant; "" where all callers are one."""
    return _tenant.get()


@dataclass(frozen=True)
class CacheScope:
    """Within what cached things are used again: requests of one tenant with the same salt.

    tenant: from the port, never from the request's body. salt: OpenAI's and vLLM's `cache_salt`; "" for none.
    """

    tenant: str = ""
    salt: str = ""

    def digest(self) -> bytes:
        """Returns 32 bytes, different for any two scopes; none for the scope without tenant and salt."""
        if not (self.tenant or self.salt):
            return b""
        # JSON may contain lone surrogates.
        tenant, salt = (each.encode(errors="surrogatepass") for each in (self.tenant, self.salt))
        return hashlib.sha256(_TAG + _LENGTH.pack(len(tenant)) + tenant + salt).digest()

    @property
    def encoder_tenant(self) -> str:
        """The tenant that encoders see, which share nothing between two: of a scope with a salt its digest."""
        return f"sha256:{self.digest().hex()}" if self.salt else self.tenant
