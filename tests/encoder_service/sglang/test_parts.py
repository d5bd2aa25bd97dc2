"""The table of parts is bounded, and discards what nothing came of."""

from __future__ import annotations

import pytest

from vitrine_vlm.encoder_service.sglang.parts import PartTable
from vitrine_vlm.errors import BadRequest, Overloaded


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_parts_without_an_encode_expire() -> None:
    clock = Clock()
    table = PartTable(10.0, clock=clock)
    table.get("one").add("tcp://127.0.0.1:1", 2)
    clock.now = 6.0
    table.get("two")
    clock.now = 11.0
    assert table.get("two") is table.get("two")
    assert len(table) == 1
    assert not table.get("one").endpoints, "it is another part by now"


def test_parts_in_work_do_not_expire() -> None:
    clock = Clock()
    table = PartTable(10.0, clock=clock)
    with table.in_work("one") as part:
        clock.now = 11.0
        assert table.get("one") is part
        clock.now = 22.0
        table.get("two")
        assert table.get("one") is part and len(table) == 2
    assert len(table) == 1


def test_a_failed_part_waits_for_its_receivers_and_expires() -> None:
    clock = Clock()
    table = PartTable(10.0, clock=clock)
    with table.in_work("one") as part:
        part.add("tcp://127.0.0.1:1", 2)
        part.error_frames = [b"error"]
    clock.now = 9.0
    assert table.get("one").error_frames == [b"error"]
    with pytest.raises(BadRequest, match="has failed"), table.in_work("one"):
        pass
    assert table.get("one").error_frames == [b"error"]
    clock.now = 11.0
    assert table.get("one").error_frames is None


def test_a_failed_part_whose_receivers_are_all_known_is_removed() -> None:
    table = PartTable(10.0)
    with table.in_work("one") as part:
        part.add("tcp://127.0.0.1:1", 1)
        part.error_frames = [b"error"]
    assert len(table) == 0


def test_there_are_not_too_many() -> None:
    clock = Clock()
    table = PartTable(10.0, max_parts=2, clock=clock)
    table.get("one"), table.get("two")
    with pytest.raises(Overloaded, match="2 parts"):
        table.get("three")
    table.get("one")
    clock.now = 10.0
    table.get("three")
