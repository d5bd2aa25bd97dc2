"""Leases end exactly once, whichever way comes first."""

from __future__ import annotations

from vitrine_vlm.embedding_transport.pools.leases import LeaseTable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def table(clock: Clock) -> tuple[LeaseTable[str], list[str]]:
    given_back: list[str] = []
    return LeaseTable(10.0, clock, given_back.append), given_back


def grant(leases: LeaseTable[str], session: str, block: str) -> int:
    return leases.grant(leases.reserve_id(), session, block).lease_id


def test_release_counts_and_gives_back_once() -> None:
    leases, given_back = table(Clock())
    first, second = grant(leases, "a", "one"), grant(leases, "a", "two")
    assert first != second
    assert leases.release("a", [first, first, 999]) == (1, 2)
    assert given_back == ["one"]
    assert len(leases) == 1
    assert (leases.counts.granted, leases.counts.released, leases.counts.unknown) == (2, 1, 2)


def test_a_session_cannot_release_anothers_lease() -> None:
    leases, given_back = table(Clock())
    lease = grant(leases, "a", "one")
    assert leases.release("b", [lease]) == (0, 1)
    assert not given_back


def test_leases_expire_at_their_time_and_not_before() -> None:
    clock = Clock()
    leases, given_back = table(clock)
    early = grant(leases, "a", "early")
    clock.now += 5
    grant(leases, "a", "late")
    clock.now += 4.999
    assert leases.expire() == 0
    clock.now += 0.001
    assert leases.expire() == 1
    assert given_back == ["early"]
    assert leases.release("a", [early]) == (0, 1)
    assert leases.counts.expired == 1


def test_a_lost_peers_leases_are_reclaimed_and_nobody_elses() -> None:
    leases, given_back = table(Clock())
    for session, block in (("a", "one"), ("b", "two"), ("a", "three")):
        grant(leases, session, block)
    assert leases.release_session("a") == 2
    assert sorted(given_back) == ["one", "three"]
    assert leases.release_session("a") == 0
    assert leases.counts.reclaimed == 2
