"""Which network addresses media may come from.

URLs are not trusted, and the encoder runs inside the cluster: without this check it would fetch what the author of a
URL cannot reach. The check is made between resolving a name and connecting, so that the address that is checked is the
one that is connected to, whatever the name resolves to the next time.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from vitrine_vlm.errors import MediaNotAllowed

_NAT64 = IPv6Network("64:ff9b::/96")
_MAX_LOOKUPS = 32


def check_address(address: str, allow_private: bool) -> None:
    """Refuses addresses that media may not come from.

    Multicast, link-local (cloud metadata), reserved and unspecified addresses are always refused, private and loopback
    ones unless `allow_private`. An IPv6 address that carries an IPv4 address (mapped, 6to4, Teredo, NAT64) is judged by
    that one, too.

    Raises:
        MediaNotAllowed: names the address and the reason.
    """
    try:
        parsed = ip_address(address)
    except ValueError as error:
        raise MediaNotAllowed(f"{address!r} is no canonical IP address: write it in full or use a host name") from error
    for candidate in (parsed, *_embedded_ipv4(parsed)):
        reason = _refusal(candidate, allow_private)
        if reason:
            raise MediaNotAllowed(
                f"address {address} is {reason}: use media on a public address, or send the file itself"
            )


def check_host(url: URL, allow_private: bool) -> None:
    """Applies `check_address` to a URL that has an address instead of a host name, which no resolver sees.

    Raises:
        MediaNotAllowed: the host is an address that media may not come from.
    """
    host = url.raw_host or ""
    # This also catches the forms that only the C library reads as an address, such as 2130706433 or 127.1.
    if ":" in host or host.replace(".", "").isdigit():
        check_address(host, allow_private)


class CheckedResolver(AbstractResolver):
    """Resolves names by the system's resolver and refuses names that have an address which is not allowed.

    It has threads of its own: a name whose servers do not answer occupies one for many seconds.
    """

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._threads = ThreadPoolExecutor(_MAX_LOOKUPS, thread_name_prefix="encoder-resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """
        Raises:
            MediaNotAllowed: one of the addresses is refused.
            OSError, UnicodeError: no such name.
        """
        look_up = functools.partial(
            socket.getaddrinfo, host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        results: list[ResolveResult] = []
        for found_family, _, proto, _, (address, *_) in found:
            check_address(str(address), self._allow_private)
            results.append(
                ResolveResult(
                    hostname=host, host=str(address), port=port, family=found_family, proto=proto, flags=numeric
                )
            )
        return results

    async def close(self) -> None:
        """Discards lookups that have not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _refusal(address: IPv4Address | IPv6Address, allow_private: bool) -> str:
    """The reason why `address` is refused; empty where it is allowed."""
    if address.is_unspecified:
        return "unspecified"
    if address.is_multicast:
        return "a multicast address"
    if address.is_link_local or (isinstance(address, IPv6Address) and address.is_site_local):
        return "link-local"
    if address.is_loopback:  # before "reserved": ::1 is in a reserved block
        return "" if allow_private else "a loopback address"
    if isinstance(address, IPv6Address) and (address.ipv4_mapped or address in _NAT64):
        return ""  # judged by the IPv4 address inside
    if address.is_reserved:
        return "reserved"
    if not address.is_global and not allow_private:
        return "private"
    return ""


def _embedded_ipv4(address: IPv4Address | IPv6Address) -> list[IPv4Address]:
    if isinstance(address, IPv4Address):
        return []
    embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        embedded.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [inner for inner in embedded if inner is not None]
