"""The tenant of the request that the current task serves: caches and pools are shared within one tenant only."""

from __future__ import annotations

from contextvars import ContextVar

_tenant: ContextVar[str] = ContextVar("tenant", default="")


def set_tenant(tenant: str) -> None:
    """Sets the tenant of the current task and of the tasks that it starts from now on."""
    _tenant.set(tenant)


def current_tenant() -> str:
    """Returns the tenant; "" where callers are not told apart."""
    return _tenant.get()
