"""A lease ends exactly once: by release, by expiry, or with its session."""

from __future__ import annotations

from vitrine_vlm.embedding_transport.pools.leases import LeaseTable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def table(clock: Clock) -> tuple[LeaseTable[str], list[str]]:
    ended: list[str] = []
    return LeaseTable(10.0, clock, ended.append), ended


def grant(leases: LeaseTable[str], session: str, block: str) -> int:
    return leases.grant(leases.reserve_id(), session, block).lease_id


def test_release_counts_and_ends_each_lease_once() -> None:
    leases, ended = table(Clock())
    first, second = grant(leases, "a", "one"), grant(leases, "a", "two")
    assert first != second
    assert leases.release("a", [first, first, 999]) == (1, 2)
    assert ended == ["one"]
    assert len(leases) == 1
    assert (leases.counts.granted, leases.counts.released, leases.counts.unknown) == (2, 1, 2)


def test_a_session_cannot_release_anothers_lease() -> None:
    leases, ended = table(Clock())
    lease = grant(leases, "a", "one")
    assert leases.release("b", [lease]) == (0, 1)
    assert not ended


def test_what_calls_have_not_read_ends() -> None:
    leases, ended = table(Clock())
    ids = {
        block: leases.grant(leases.reserve_id(), session, block, call_id).lease_id
        for session, call_id, block in (
            ("a", 1, "read"),
            ("a", 1, "unread"),
            ("a", 2, "of another call"),
            ("b", 1, "of another session"),
            ("a", 0, "of no call"),
        )
    }
    assert leases.release_unread("a", {1: [ids["read"], ids["of another session"]], 3: []}) == 1
    assert ended == ["unread"]
    assert leases.release_unread("a", {1: []}) == 1
    assert ended == ["unread", "read"]
    assert (len(leases), leases.counts.released) == (3, 2)


def test_leases_expire_at_their_time_and_not_before() -> None:
    clock = Clock()
    leases, ended = table(clock)
    early = grant(leases, "a", "early")
    clock.now += 5
    grant(leases, "a", "late")
    clock.now += 4.999
    assert leases.expire() == 0
    clock.now += 0.001
    assert leases.expire() == 1
    assert ended == ["early"]
    assert leases.release("a", [early]) == (0, 1)
    assert leases.counts.expired == 1


def test_the_end_of_a_session_ends_its_leases_and_no_others() -> None:
    leases, ended = table(Clock())
    for session, block in (("a", "one"), ("b", "two"), ("a", "three")):
        grant(leases, session, block)
    assert leases.release_session("a") == 2
    assert sorted(ended) == ["one", "three"]
    assert leases.release_session("a") == 0
    assert leases.counts.reclaimed == 2
