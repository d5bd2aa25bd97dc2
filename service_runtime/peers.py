"""Who is at the other end of a gRPC call: the names in its certificate, and which of them are allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote

import grpc

# Of gRPC's authentication context. Names of other kinds, such as e-mail addresses, are not looked at.
_SAN_PROPERTIES = ("peer_uri", "peer_dns")


@dataclass(frozen=True)
class Peer:
    """The other side of a connection.

    name: what its quotas go by: the first of its identities, else the host of its address.
    identities: URIs and DNS names of its certificate; none where certificates are not required.
    """

    name: str
    identities: tuple[str, ...] = ()


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """Returns who calls. gRPC has checked the certificate against the CA before the call begins."""
    properties = context.auth_context()
    identities = tuple(value.decode() for name in _SAN_PROPERTIES for value in properties.get(name, ()))
    return Peer(identities[0] if identities else host_of(context.peer()), identities)


class PeerPatterns:
    """Names of peers; `*` stands for one label of a DNS name, or one segment of a URI's path.

    Args:
        patterns: such as `*.workers.example`, `spiffe://example/ns/vitrine/sa/*`, or `*` for all.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = [_compiled(pattern) for pattern in patterns]

    @classmethod
    def parse(cls, names: str) -> Self:
        """
        Args:
            names: patterns, separated by commas.

        Raises:
            ValueError: one of them is empty, or has a space in it.
        """
        patterns = [pattern.strip() for pattern in names.split(",")] if names else []
        for pattern in patterns:
            if not pattern or any(character.isspace() for character in pattern):
                raise ValueError(f"{pattern!r} is no name of a peer: give DNS names or URIs, separated by commas")
        return cls(patterns)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._patterns)

    def match(self, peer: Peer) -> bool:
        """Whether one of the peer's identities has one of these names."""
        return any(pattern.fullmatch(name.lower()) for pattern in self._patterns for name in peer.identities)


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern == "*":
        return re.compile(".*", re.DOTALL)
    any_part = "[^/]+" if "://" in pattern else "[^./]+"
    return re.compile(any_part.join(map(re.escape, pattern.lower().split("*"))))


def host_of(address: str) -> str:
    """The host of gRPC's form of an address, `ipv4:HOST:PORT`, `ipv6:[HOST]:PORT` with escapes, or `unix:PATH`."""
    kind, _, place = unquote(address).partition(":")
    return place.rpartition(":")[0] if kind in ("ipv4", "ipv6") else address
