"""Which addresses are refused."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import unused_port
from yarl import URL

from vitrine_vlm.encoder_service.media.address_policy import CheckedResolver, check_address, check_host
from vitrine_vlm.errors import MediaNotAllowed

PRIVATE = ["127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1", "::1", "fd00::1",
           "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1", "2002:0a00:0001::1"]  # fmt: skip
NEVER = ["169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::", "fe80::1", "fe80::1%eth0",
         "ff02::1", "fec0::1", "::ffff:169.254.169.254", "::ffff:0.0.0.0", "64:ff9b::a9fe:a9fe", "::127.0.0.1",
         "not an address", ""]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_need_permission(address: str) -> None:
    with pytest.raises(MediaNotAllowed, match=address):
        check_address(address, allow_private=False)
    check_address(address, allow_private=True)


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("allow_private", [False, True])
def test_some_addresses_are_never_allowed(address: str, allow_private: bool) -> None:
    with pytest.raises(MediaNotAllowed):
        check_address(address, allow_private)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    check_address(address, allow_private=False)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://[::1]/", "http://[::ffff:7f00:1]/", "http://2130706433/", "http://127.1/",
     "http://127.0.0.1./", "http://0177.0.0.1/", "http://①②⑦.⓪.⓪.①/", "http://user:word@127.0.0.1:80/"],
)  # fmt: skip
def test_addresses_in_urls(url: str) -> None:
    with pytest.raises(MediaNotAllowed):
        check_host(URL(url), allow_private=False)


@pytest.mark.parametrize("host", ["localhost", "0x7f.1", "0x7f000001"])
async def test_names_are_judged_by_what_they_resolve_to(host: str) -> None:
    """The last two are read as addresses only by the C library's resolver."""
    resolver = CheckedResolver(allow_private=False)
    with pytest.raises(MediaNotAllowed, match="loopback"):
        await resolver.resolve(host, unused_port())
    assert await CheckedResolver(allow_private=True).resolve(host, unused_port())
