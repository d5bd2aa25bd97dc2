"""Where items go: by content, within a bound on load."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

from vitrine_vlm.embedding_transport.fleet.content_routing import ranked
from vitrine_vlm.types import MediaItem, MediaOptions

ADDRESSES = [f"10.0.0.{number}:50051" for number in range(5)]
KEYS = [hashlib.sha256(bytes([number])).digest() for number in range(200)]


def test_the_key_is_of_content_and_options() -> None:
    picture = MediaItem("image", data=b"picture")
    assert picture.content_key == MediaItem("video", data=b"picture").content_key
    keys = {MediaItem("image", data=b"picture", options=MediaOptions(max_pixels=each)).content_key for each in (1, 2)}
    frames = (MediaItem("image", data=b"a"), MediaItem("image", data=b"b"))
    keys |= {MediaItem("video", frames=each).content_key for each in (frames, frames[::-1], frames[:1])}
    assert len(keys | {picture.content_key}) == 6
    assert MediaItem("image", url="http://host/a").content_key != MediaItem("image", url="http://host/b").content_key


def test_equal_content_goes_to_the_same_address_and_contents_spread() -> None:
    idle = dict.fromkeys(ADDRESSES, 0)
    first = {key: ranked(key, idle)[0] for key in KEYS}
    assert first == {key: ranked(key, dict(reversed(idle.items())))[0] for key in KEYS}
    assert min(Counter(first.values()).values()) > len(KEYS) / len(ADDRESSES) / 2


def test_a_new_address_takes_contents_only_for_itself() -> None:
    before = dict.fromkeys(ADDRESSES[:4], 0)
    after = dict.fromkeys(ADDRESSES, 0)
    moved = [key for key in KEYS if ranked(key, before)[0] != ranked(key, after)[0]]
    assert 0 < len(moved) < len(KEYS) / 2
    assert {ranked(key, after)[0] for key in moved} == {ADDRESSES[4]}


def test_no_address_takes_more_than_the_bound() -> None:
    loads = dict.fromkeys(ADDRESSES, 0)
    for total in range(1, 100):
        loads[ranked(KEYS[0], loads)[0]] += 1
        assert max(loads.values()) <= math.ceil(1.25 * total / len(ADDRESSES)), loads


def test_avoided_addresses_come_last_however_busy_the_others_are() -> None:
    loads = dict.fromkeys(ADDRESSES, 100) | {ADDRESSES[0]: 0}
    assert ranked(KEYS[0], loads, avoided=[ADDRESSES[0]])[-1] == ADDRESSES[0]
    assert len(ranked(KEYS[0], loads, avoided=ADDRESSES)) == len(ADDRESSES)
