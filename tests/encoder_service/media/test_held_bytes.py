from __future__ import annotations

import pytest

from vitrine_vlm.encoder_service.media.held_bytes import HeldBytes
from vitrine_vlm.errors import Overloaded


def test_items_share_the_bound() -> None:
    held = HeldBytes(10)
    with held.item() as one, held.item() as other:
        one(4)
        other(6)
        for hold in (one, other):
            with pytest.raises(Overloaded, match="10 bytes of images and videos are in work and 1 more"):
                hold(1)
        assert held.nbytes == 10
    assert held.nbytes == 0


def test_one_alone_may_pass_the_bound_and_others_wait_for_its_end() -> None:
    held = HeldBytes(10)
    with held.item() as one:
        one(8)
        one(8)
        with held.item() as other, pytest.raises(Overloaded):
            other(1)
        assert held.nbytes == 16
    with held.item() as another:
        another(1)


def test_an_item_that_fails_holds_nothing() -> None:
    held = HeldBytes(10)
    with pytest.raises(ValueError), held.item() as one:
        one(8)
        raise ValueError
    assert held.nbytes == 0
