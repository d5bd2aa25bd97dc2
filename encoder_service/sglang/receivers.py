"""Which addresses rows may be pushed to.

A request names its receivers, and anyone who reaches the port can send one: without this check an encoder would connect
to whatever it is asked to. A name is resolved once, and what is connected to is the address that was checked.
"""

from __future__ import annotations

import asyncio
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

from vitrine_vlm.errors import BadRequest

Address: TypeAlias = IPv4Address | IPv6Address

# [IPv6 network], or anything without a colon; then ports.
_SPEC = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<plain>[^:\[\]]+))(?::(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?)?")
_LOOKUP_TIMEOUT_S = 5.0
_MAX_LOOKUPS = 8


@dataclass(frozen=True)
class _Allowed:
    """A network, or else a host by its name, and the ports of it."""

    network: IPv4Network | IPv6Network | None
    host: str
    ports: range


class AllowedReceivers:
    """The receivers that `--sglang-receivers` allows. Create and use it on one event loop."""

    def __init__(self, specs: str) -> None:
        """
        Args:
            specs: separated by commas: an address, a network (CIDR) or a host name, each with `:PORT` or `:FIRST-LAST`
                behind it, or without, for all ports. IPv6 with ports stands in brackets. Empty allows none.

        Raises:
            ValueError: a spec is none of these.
        """
        self._allowed = [_parse(spec.strip()) for spec in specs.split(",") if spec.strip()]
        # Threads of its own: a name whose servers do not answer occupies one for many seconds.
        self._threads = ThreadPoolExecutor(_MAX_LOOKUPS, thread_name_prefix="encoder-receivers")

    def close(self) -> None:
        """Discards lookups that have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def endpoint(self, host: str, port: int) -> str:
        """Returns the ZMQ endpoint of a receiver, which names an allowed address.

        Raises:
            BadRequest: none of its addresses is allowed, or there is no such host.
        """
        for address in await self._addresses(host):
            if await self._allows(address, port):
                return f"tcp://[{address}]:{port}" if isinstance(address, IPv6Address) else f"tcp://{address}:{port}"
        raise BadRequest(
            f"rows may not be sent to {host[:100]}:{port}: let the encoder's --sglang-receivers name it, "
            "as an address, a network or a host name, with its ports"
        )

    async def _allows(self, address: Address, port: int) -> bool:
        for each in self._allowed:
            if port not in each.ports:
                continue
            if each.network is not None:
                if address in each.network:
                    return True
            elif address in await self._addresses(each.host):
                return True
        return False

    async def _addresses(self, host: str) -> list[Address]:
        """Returns the addresses of a host, resolved unless it is one; empty where there is no such host."""
        if "%" in host:  # a zone of IPv6, which may be any text
            return []
        try:
            return [_plain(ip_address(host))]
        except ValueError:
            pass
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
                found = await asyncio.get_running_loop().run_in_executor(
                    self._threads, socket.getaddrinfo, host, None, socket.AF_UNSPEC, socket.SOCK_STREAM
                )
        except (OSError, UnicodeError, ValueError):  # TimeoutError is an OSError; ValueError: a null character
            return []
        found_addresses = [str(address[0]) for *_, address in found]
        return list(dict.fromkeys(_plain(ip_address(each)) for each in found_addresses if "%" not in each))


def _plain(address: Address) -> Address:
    """The IPv4 address of one that is mapped into IPv6: both lead to the same host."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _parse(spec: str) -> _Allowed:
    network = _network(spec)
    if network is not None:  # IPv6 without brackets, too, as it has no ports
        return _Allowed(network, "", range(65536))
    matched = _SPEC.fullmatch(spec)
    if matched is None:
        raise ValueError(f"--sglang-receivers: {spec!r} is no address, network or host name with or without ports")
    host = matched["bracketed"] or matched["plain"]
    ports = range(65536)
    if matched["first"] is not None:
        ports = range(int(matched["first"]), int(matched["last"] or matched["first"]) + 1)
    if not ports or ports[-1] > 65535:
        raise ValueError(f"--sglang-receivers: {spec!r} has no ports between 1 and 65535")
    network = _network(host)
    if network is None and ("/" in host or matched["bracketed"]):
        raise ValueError(f"--sglang-receivers: {host!r} in {spec!r} is no network: its host bits must be 0")
    return _Allowed(network, "" if network else host, ports)


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text)
    except ValueError:
        return None
