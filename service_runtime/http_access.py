"""The check of an HTTP port: which requests need an API key, and as which tenant they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from vitrine_vlm.service_runtime.access import Access

# Probes: their answers are about the service, and have nothing of its users.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})


def add_access(application: web.Application, access: Access) -> None:
    """Lets only admitted requests reach the handlers, except for probes; unknown paths need a key, too.

    Call it behind what else adds middlewares: errors get their form, and browsers their preflight answers, outside.
    """

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is not None and resource.canonical in OPEN_PATHS:
            return await handler(request)
        # Before the body is read: a stranger's costs nothing.
        end = access.begin(request.headers)
        try:
            return await handler(request)
        finally:
            end()

    application.middlewares.append(check)
