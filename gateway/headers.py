"""Which headers pass through a gateway."""

from __future__ import annotations

from collections.abc import Mapping

from multidict import CIMultiDict

# Of one connection (RFC 9110, section 7.6.1), or made again for the other one.
_NOT_PASSED = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "host", "expect"}
)


def passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Returns the headers without those of the connection, which Connection may name more of.

    Those that are not UTF-8 are left out, too.
    """
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    removed = _NOT_PASSED | named
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in removed and is_utf8(value)
    )


def is_utf8(text: str) -> bool:
    """Whether this text came as UTF-8: aiohttp has other bytes as surrogates, which it cannot send."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
