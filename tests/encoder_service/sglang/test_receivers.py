"""Rows go to allowed addresses only, whatever a receiver is called."""

from __future__ import annotations

import pytest

from vitrine_vlm.encoder_service.sglang.bodies import split_receive_url
from vitrine_vlm.encoder_service.sglang.receivers import AllowedReceivers
from vitrine_vlm.errors import BadRequest


@pytest.mark.parametrize(
    ("specs", "host", "port", "endpoint"),
    [
        ("10.1.2.3", "10.1.2.3", 1, "tcp://10.1.2.3:1"),
        ("10.0.0.0/8", "10.200.0.1", 65535, "tcp://10.200.0.1:65535"),
        ("10.0.0.0/8:5000-5010", "10.0.0.1", 5000, "tcp://10.0.0.1:5000"),
        ("192.168.0.0/16, 10.0.0.0/8:5000", "10.0.0.1", 5000, "tcp://10.0.0.1:5000"),
        ("127.0.0.1:70", "::ffff:127.0.0.1", 70, "tcp://127.0.0.1:70"),
        ("fd00::/8", "fd00::7", 70, "tcp://[fd00::7]:70"),
        ("[fd00::/8]:70-71", "fd00::7", 71, "tcp://[fd00::7]:71"),
        ("127.0.0.0/8", "localhost", 70, "tcp://127.0.0.1:70"),
        ("localhost:70", "127.0.0.1", 70, "tcp://127.0.0.1:70"),
        ("localhost:70", "localhost", 70, "tcp://127.0.0.1:70"),
        ("127.0.0.1", "2130706433", 70, "tcp://127.0.0.1:70"),  # as the C library reads it
    ],
)
async def test_an_allowed_receiver(specs: str, host: str, port: int, endpoint: str) -> None:
    allowed = AllowedReceivers(specs)
    assert await allowed.endpoint(host, port) == endpoint
    allowed.close()


@pytest.mark.parametrize(
    ("specs", "host", "port"),
    [
        ("", "127.0.0.1", 70),
        ("10.0.0.0/8", "11.0.0.1", 70),
        ("10.0.0.0/8:5000-5010", "10.0.0.1", 5011),
        ("10.0.0.0/8:5000-5010", "10.0.0.1", 4999),
        ("10.0.0.0/8", "localhost", 70),
        ("10.0.0.0/8", "::ffff:127.0.0.1", 70),
        ("10.0.0.0/8", "2130706433", 70),
        ("10.0.0.0/8", "127.1", 70),
        ("localhost", "127.0.0.2", 70),
        ("fe80::/10", "fe80::1%eth0", 70),
        ("fe80::/10", "fe80::1%x]:1/", 70),
        ("10.0.0.0/8", "no-such-host.invalid", 70),
        ("10.0.0.0/8", "no\0host", 70),
        ("10.0.0.0/8", "x" * 255, 70),
        ("no-such-host.invalid", "10.0.0.1", 70),
    ],
)
async def test_all_others_are_refused(specs: str, host: str, port: int) -> None:
    allowed = AllowedReceivers(specs)
    with pytest.raises(BadRequest, match="--sglang-receivers"):
        await allowed.endpoint(host, port)
    allowed.close()


@pytest.mark.parametrize(
    "specs",
    ["10.0.0.1/8", "10.0.0.1:", "10.0.0.1:0-99999", "10.0.0.1:70-60", "10.0.0.1:x", "[fd00::1/8]", "[host]:5", "a:b:c"],
)
def test_what_is_no_list_of_receivers_is_refused(specs: str) -> None:
    with pytest.raises(ValueError, match="--sglang-receivers"):
        AllowedReceivers(specs)


def test_a_receive_url_is_a_host_and_a_port() -> None:
    assert split_receive_url("10.0.0.1:5000") == ("10.0.0.1", 5000)
    assert split_receive_url("[fd00::1]:5000") == ("fd00::1", 5000)
    assert split_receive_url("name:1") == ("name", 1)
    for bad in ("10.0.0.1", ":5000", "fd00::1:5000", "[]:1", "host:0", "host:65536", "host:٣", "host:-1", "tcp://h:1"):
        with pytest.raises(BadRequest, match="receive_url"):
            split_receive_url(bad)
