"""What a request remembers of the peers that failed it, and how long it tries again."""

from __future__ import annotations

import time
import weakref

import pytest

from vitrine_vlm.service_runtime.retry import Attempts, RetryBudget, RetryPolicy


class PeerLost(Exception):
    pass


async def test_a_budget_of_zero_leaves_no_second_try() -> None:
    assert not await RetryBudget(0.0).pause()


async def test_pauses_grow_until_the_budget_is_spent() -> None:
    budget, started, num_pauses = RetryBudget(0.5), time.monotonic(), 0
    while await budget.pause():
        num_pauses += 1
    assert time.monotonic() - started >= 0.5
    assert 2 <= num_pauses <= 5  # 0.05 s, 0.1 s, 0.2 s, ... at the least


def test_only_errors_of_the_policy_go_elsewhere() -> None:
    attempts = Attempts(RetryPolicy((PeerLost,)))

    def ask(error: Exception) -> None:
        try:
            raise error
        except attempts.elsewhere as lost:
            attempts.failed("address", lost)

    ask(PeerLost("killed"))
    assert str(attempts.failures["address"]) == "killed"
    with pytest.raises(ValueError, match="of the request"):
        ask(ValueError("of the request"))


def test_a_failure_holds_nothing_of_the_request() -> None:
    class Media:
        pass

    attempts = Attempts(RetryPolicy((PeerLost,)))

    def ask() -> weakref.ref[Media]:
        media = Media()
        try:
            try:
                raise OSError("reset")
            except OSError as error:
                raise PeerLost("killed") from error
        except attempts.elsewhere as lost:
            attempts.failed("address", lost)
        return weakref.ref(media)

    assert ask()() is None
    assert attempts.failures
