"""The scheduler's side with fetches that the test completes, so that each can be caught at every stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from tests.vllm_connector.vllm_requests import Elem, Feature, Place, Request, metadata, plain, ticket
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.vllm_connector.deliveries import Deliveries
from vitrine_vlm.vllm_connector.fetching import FetchOrder, FetchResult, RowFormat
from vitrine_vlm.vllm_connector.messages import StepCommands
from vitrine_vlm.vllm_connector.scheduler_side import EngineFacts, SchedulerSide
from vitrine_vlm.vllm_connector.settings import ConnectorSettings
from vitrine_vlm.vllm_connector.stats import StatsCollector

# Four rows of an item are 160 bytes.
FACTS = EngineFacts(RowFormat("float32", 10), pixels_normalized=False, step_tokens=100, merge_size=2)
SETTINGS = ConnectorSettings(encoders="localhost:1", deliver_timeout_s=5.0, encode_timeout_s=50.0, tenant="plain")


@dataclass
class ManualFetcher:
    """Takes orders down; `land` and `fail` complete them."""

    orders: dict[int, FetchOrder] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    discarded: list[int] = field(default_factory=list)
    results: list[FetchResult] = field(default_factory=list)

    def fetch(self, order: FetchOrder) -> None:
        self.orders[order.delivery_id] = order

    def cancel(self, delivery_id: int) -> None:
        self.cancelled.append(delivery_id)

    def discard(self, delivery_id: int) -> None:
        self.discarded.append(delivery_id)

    def take_results(self) -> list[FetchResult]:
        results, self.results = self.results, []
        return results

    def land(self, delivery_id: int) -> None:
        self.results.append(FetchResult(delivery_id, 0.01, None, "shm", 160))

    def fail(self, delivery_id: int) -> None:
        self.results.append(FetchResult(delivery_id, 0.01, EncoderUnavailable("no encoder is left")))


class Scheduler:
    """A scheduler's side with its parts; `now` is its clock."""

    def __init__(self, max_landed_bytes: int = 10_000) -> None:
        self.fetcher = ManualFetcher()
        self.stats = StatsCollector()
        self.now = 0.0
        deliveries = Deliveries(self.fetcher, max_landed_bytes, self.stats, lambda: self.now)
        self.side = SchedulerSide(SETTINGS, FACTS, deliveries)

    @property
    def items(self) -> dict[str, int]:
        """Counts since the last call."""
        report = self.stats.take_report()
        return {} if report is None else report["items"]

    def load(self, *identifiers: str) -> StepCommands:
        """A step that places these items in vLLM's encoder cache."""
        for identifier in identifiers:
            self.side.allocated(plain(identifier, 0))
        return self.side.take_step_commands([], num_tokens=8)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def test_a_plain_request_waits_for_its_rows_and_frees_them_behind_the_item(scheduler: Scheduler) -> None:
    side, request = scheduler.side, Request("r", [plain("x", 10)])
    assert not side.ensure_available(request, 0)
    assert not side.has_rows("x")
    (order,) = scheduler.fetcher.orders.values()
    assert (order.num_tokens, order.tenant, order.make_item().kind) == (4, "plain", "image")
    assert not side.ensure_available(request, 0)
    assert len(scheduler.fetcher.orders) == 1, "asked for once"
    scheduler.fetcher.land(0)
    assert side.ensure_available(request, 0)
    assert side.has_rows("x")
    assert scheduler.load("x") == StepCommands({"x": 0}, [])
    assert side.ensure_available(request, 12), "in the middle of the item"
    assert scheduler.load() == StepCommands({}, [])
    assert side.ensure_available(request, 14)
    assert side.take_step_commands([], num_tokens=0) == StepCommands({}, []), "workers may not see an empty step"
    assert scheduler.load() == StepCommands({}, [0])
    side.finished("r")
    assert scheduler.fetcher.discarded == [] and scheduler.items == {"delivered": 1}
    assert scheduler.stats.landed_nbytes == 0


def test_rows_of_a_request_with_a_salt_are_those_of_its_salt_alone(scheduler: Scheduler) -> None:
    for salt in ("red", "blue"):
        assert not scheduler.side.ensure_available(Request(salt, [plain(salt, 10)], cache_salt=salt), 0)
    scopes = [CacheScope("plain", "red"), CacheScope("plain", "blue")]
    assert [order.tenant for order in scheduler.fetcher.orders.values()] == [each.encoder_tenant for each in scopes]


def test_what_the_prefix_cache_covers_is_not_fetched(scheduler: Scheduler) -> None:
    request = Request("r", [plain("x", 10), plain("y", 20)])
    assert not scheduler.side.ensure_available(request, 14)
    assert [order.request_id for order in scheduler.fetcher.orders.values()] == ["r"]
    assert not scheduler.side.has_rows("x")
    assert scheduler.side.ensure_available(Request("s", [plain("x", 10)]), 14)


def test_an_item_in_vllms_cache_is_not_fetched_until_it_is_evicted(scheduler: Scheduler) -> None:
    side = scheduler.side
    side.allocated(plain("x", 0))
    side.take_step_commands([], 8)
    assert side.ensure_available(Request("r", [plain("x", 0)]), 0)
    side.take_step_commands(["x"], 8)
    assert not side.ensure_available(Request("s", [plain("x", 0)]), 0)


def test_an_item_with_a_ticket_is_held_here_whatever_vllms_cache_has(scheduler: Scheduler) -> None:
    """vLLM does not report a preemption's or a reset's evictions, and without its rows such an item ends the engine."""
    side, request = scheduler.side, Request("r", [metadata("u", 0)], {"u": ticket()})
    side.allocated(metadata("u", 0))
    side.take_step_commands([], 8)
    assert not side.ensure_available(request, 0)
    assert scheduler.fetcher.orders[0].tenant == "t"
    scheduler.fetcher.land(0)
    assert side.ensure_available(request, 0)
    scheduler.load("u")
    assert side.ensure_available(request, 2) and side.has_rows("u"), "still there, should vLLM ask again"
    assert scheduler.load("u").loads == {"u": 0}
    assert side.ensure_available(request, 4)
    assert not side.ensure_available(request, 0), "preempted"
    assert 1 in scheduler.fetcher.orders


def test_the_same_picture_twice_is_fetched_once_and_held_to_its_last_place(scheduler: Scheduler) -> None:
    side, request = scheduler.side, Request("r", [plain("x", 0), plain("x", 50)])
    assert not side.ensure_available(request, 0)
    scheduler.fetcher.land(0)
    assert side.ensure_available(request, 0)
    scheduler.load("x")
    assert side.ensure_available(request, 20) and side.has_rows("x")
    assert scheduler.load().discards == []
    assert side.ensure_available(request, 54)
    assert scheduler.load().discards == [0]
    assert len(scheduler.fetcher.orders) == 1


def test_two_requests_share_one_fetch(scheduler: Scheduler) -> None:
    side = scheduler.side
    first, second = Request("r", [plain("x", 0)]), Request("s", [plain("x", 0)])
    assert not side.ensure_available(first, 0) and not side.ensure_available(second, 0)
    side.finished("r")
    assert scheduler.fetcher.cancelled == []
    scheduler.fetcher.land(0)
    assert side.ensure_available(second, 0)
    side.finished("s")
    assert scheduler.fetcher.discarded == [0]


def test_items_beyond_the_next_step_do_not_hold_it_up(scheduler: Scheduler) -> None:
    request = Request("r", [plain("x", 0), plain("y", 100)])
    assert not scheduler.side.ensure_available(request, 0)
    assert len(scheduler.fetcher.orders) == 2, "fetched ahead"
    scheduler.fetcher.land(0)
    assert scheduler.side.ensure_available(request, 0)
    assert not scheduler.side.ensure_available(request, 4)


def test_vllms_own_tower_does_what_vitrine_cannot_deliver(scheduler: Scheduler) -> None:
    side, request = scheduler.side, Request("r", [plain("x", 0)])
    assert not side.ensure_available(request, 0)
    scheduler.fetcher.fail(0)
    assert side.ensure_available(request, 0)
    assert not side.has_rows("x")
    assert side.take_unavailable() == set()
    assert scheduler.load("x") == StepCommands({}, [])
    assert scheduler.items == {"own_tower": 1}


def test_vllms_own_tower_does_what_is_late(scheduler: Scheduler) -> None:
    side, request = scheduler.side, Request("r", [plain("x", 0)])
    assert not side.ensure_available(request, 0)
    scheduler.now = 5.1
    assert side.ensure_available(request, 0)
    assert scheduler.fetcher.cancelled == [0] and not side.has_rows("x")
    scheduler.fetcher.land(0)  # the result was on its way
    assert side.ensure_available(request, 0) and not side.has_rows("x")
    assert scheduler.fetcher.discarded == [0]
    assert scheduler.items == {"own_tower": 1}


@pytest.mark.parametrize("params", [None, {}, {"u": {"ticket": "?"}}, {"v": ticket()}])
def test_metadata_without_a_good_ticket_fails_its_request_alone(
    scheduler: Scheduler, params: dict[str, object] | None
) -> None:
    side = scheduler.side
    assert not side.ensure_available(Request("r", [metadata("u", 0)], params), 0)
    assert side.take_unavailable() == {"r"} and scheduler.fetcher.orders == {}
    side.finished("r")
    assert scheduler.items == {"failed": 1}
    assert not side.ensure_available(Request("s", [metadata("u", 0)], {"u": ticket()}), 0), "another one may"
    assert side.take_unavailable() == set() and len(scheduler.fetcher.orders) == 1


def test_a_request_whose_equal_item_failed_for_another_request_tries_its_own_ticket(scheduler: Scheduler) -> None:
    side, fetcher = scheduler.side, scheduler.fetcher
    without = Request("without", [metadata("u", 0)])
    bad, good = (Request(name, [metadata("u", 0)], {"u": ticket(encoder_id=name)}) for name in ("bad", "good"))
    assert not side.ensure_available(without, 0)
    assert not side.ensure_available(bad, 0)
    assert not side.ensure_available(good, 0)
    assert side.take_unavailable() == {"without"}, "the others have tickets"
    side.finished("without")
    fetcher.fail(1)
    assert not side.ensure_available(bad, 0)
    assert not side.ensure_available(good, 0)
    assert [order.request_id for order in fetcher.orders.values()] == ["bad", "good"]
    assert side.take_unavailable() == {"bad"}
    side.finished("bad")
    fetcher.land(2)
    assert side.ensure_available(good, 0) and side.has_rows("u")
    side.finished("good")
    assert scheduler.items == {"delivered": 1} and scheduler.stats.landed_nbytes == 0


def test_each_ticket_is_tried_once(scheduler: Scheduler) -> None:
    side = scheduler.side
    requests = [Request(name, [metadata("u", 0)], {"u": ticket()}) for name in "ab"]
    for number in range(2):
        assert [side.ensure_available(request, 0) for request in requests] == [False, False]
        scheduler.fetcher.fail(number)
    assert [side.ensure_available(request, 0) for request in requests] == [False, False]
    assert side.take_unavailable() == {"a", "b"} and len(scheduler.fetcher.orders) == 2
    for request in requests:
        side.finished(request.request_id)
    assert scheduler.items == {"failed": 1} and scheduler.stats.landed_nbytes == 0


def test_an_item_without_pixels_is_never_left_to_the_tower_that_an_equal_one_has(scheduler: Scheduler) -> None:
    side = scheduler.side
    with_pixels, without = Request("p", [plain("u", 0)]), Request("m", [metadata("u", 0)], {"u": ticket()})
    assert not side.ensure_available(with_pixels, 0)
    assert not side.ensure_available(without, 0)
    scheduler.fetcher.fail(0)
    assert side.ensure_available(with_pixels, 0), "by its own tower"
    assert not side.ensure_available(without, 0)
    assert side.take_unavailable() == {"m"}


def test_an_item_with_pixels_is_left_to_the_tower_though_an_equal_one_has_none(scheduler: Scheduler) -> None:
    side = scheduler.side
    without, with_pixels = Request("m", [metadata("u", 0)], {"u": ticket()}), Request("p", [plain("u", 0)])
    assert not side.ensure_available(without, 0)
    assert not side.ensure_available(with_pixels, 0)
    scheduler.fetcher.fail(0)
    assert not side.ensure_available(with_pixels, 0), "its pixels are sent"
    scheduler.fetcher.fail(1)
    assert side.ensure_available(with_pixels, 0) and not side.ensure_available(without, 0)
    assert side.take_unavailable() == {"m"}


@pytest.mark.parametrize("where", ["in flight", "in vLLM's cache", "in one request"])
def test_one_uuid_for_items_of_two_sizes_fails_the_second_request_alone(scheduler: Scheduler, where: str) -> None:
    """vLLM would take the first one's rows, and its workers fail for all requests."""
    side, small, large = scheduler.side, plain("u", 0), plain("u", 4, length=6)
    first = Request("first", [small])
    second = Request("second", [small, large] if where == "in one request" else [large])
    if where != "in one request":
        assert not side.ensure_available(first, 0)
    if where == "in vLLM's cache":
        scheduler.fetcher.land(0)
        assert side.ensure_available(first, 0)
        scheduler.load("u")
        assert side.ensure_available(first, 4)
    assert not side.ensure_available(second, 0)
    assert side.take_unavailable() == {"second"}
    side.finished("second")
    if where == "in vLLM's cache":
        side.take_step_commands(["u"], num_tokens=8)  # evicted
        assert not side.ensure_available(second, 0)
        assert side.take_unavailable() == set()


@pytest.mark.parametrize("num_computed_tokens", [0, 4])  # 4: the prefix cache has it all
@pytest.mark.parametrize(
    ("modality", "grid"),
    [
        ("image", (2, 2, 4)),
        ("image", (1, 1, 16)),
        ("image", (1, -4, -4)),
        ("image", (1, 4, 8)),
        ("image", (4, 4)),
        ("image", ()),
        ("video", (0, 4, 4)),
        ("video", (1, 3, 5)),
    ],
)
def test_a_grid_that_vllm_cannot_position_fails_its_request_alone(
    scheduler: Scheduler, modality: str, grid: tuple[int, ...], num_computed_tokens: int
) -> None:
    """In vLLM's workers it would end the engine."""
    side = scheduler.side
    feature = Feature("u", Place(0, 4), {f"{modality}_grid_thw": Elem(torch.tensor(grid))}, modality)
    assert not side.ensure_available(Request("r", [feature], {"u": ticket(kind=modality)}), num_computed_tokens)
    assert side.take_unavailable() == {"r"} and scheduler.fetcher.orders == {}
    side.finished("r")


def test_a_video_has_a_grid_of_several_frames(scheduler: Scheduler) -> None:
    video = Feature("u", Place(0, 9, 4), {"video_grid_thw": Elem(torch.tensor((2, 2, 4)))}, "video")
    assert not scheduler.side.ensure_available(Request("r", [video], {"u": ticket(kind="video")}), 0)
    assert scheduler.side.take_unavailable() == set() and len(scheduler.fetcher.orders) == 1


def test_items_without_a_tower_are_left_to_vllm(scheduler: Scheduler) -> None:
    audio = Feature("a", Place(0, 4), {}, modality="audio")
    assert scheduler.side.ensure_available(Request("r", [audio]), 0)
    assert scheduler.side.take_unavailable() == set() and scheduler.fetcher.orders == {}


def test_a_request_with_a_ticket_fails_with_its_fetch(scheduler: Scheduler) -> None:
    side, request = scheduler.side, Request("r", [metadata("u", 0)], {"u": ticket()})
    assert not side.ensure_available(request, 0)
    scheduler.now = 6.0
    assert not side.ensure_available(request, 0)
    assert side.take_unavailable() == set(), "encode_timeout_s, not the time after which the own tower takes over"
    scheduler.fetcher.fail(0)
    assert not side.ensure_available(request, 0)
    assert side.take_unavailable() == {"r"}
    side.finished("r")
    assert side.take_unavailable() == set() and scheduler.items == {"failed": 1}


def test_an_abort_at_any_stage_leaves_nothing(scheduler: Scheduler) -> None:
    side = scheduler.side
    side.ensure_available(Request("in flight", [plain("a", 0)]), 0)
    side.finished("in flight")
    assert scheduler.fetcher.cancelled == [0]
    side.ensure_available(Request("landed", [plain("b", 0)]), 0)
    scheduler.fetcher.land(1)
    side.finished("landed")
    assert scheduler.fetcher.cancelled == [0, 1], "its result had not been seen"
    side.finished("another")
    assert scheduler.fetcher.discarded == [1]
    request = Request("loaded", [plain("c", 0)])
    side.ensure_available(request, 0)
    scheduler.fetcher.land(2)
    side.ensure_available(request, 0)
    scheduler.load("c")
    side.finished("loaded")
    assert scheduler.load().discards == [2]
    assert scheduler.stats.landed_nbytes == 0
    assert scheduler.items == {"cancelled": 2, "delivered": 1}
    side.finished("never seen")


def test_rows_take_no_more_memory_than_they_may_the_oldest_first() -> None:
    scheduler = Scheduler(max_landed_bytes=320)
    side, requests = scheduler.side, [Request(name, [plain(name, 0)]) for name in "abc"]
    assert not any(side.ensure_available(request, 0) for request in requests)
    assert [order.request_id for order in scheduler.fetcher.orders.values()] == ["a", "b"]
    scheduler.fetcher.land(0)
    assert side.ensure_available(requests[0], 0)
    scheduler.load("a")
    assert side.ensure_available(requests[0], 4), "behind its item"
    assert not side.ensure_available(requests[2], 0)
    assert [order.request_id for order in scheduler.fetcher.orders.values()] == ["a", "b", "c"]


def test_an_abort_makes_room(scheduler: Scheduler) -> None:
    scheduler = Scheduler(max_landed_bytes=160)
    requests = [Request(name, [plain(name, 0)]) for name in "ab"]
    assert not any(scheduler.side.ensure_available(request, 0) for request in requests)
    assert len(scheduler.fetcher.orders) == 1
    scheduler.side.finished("a")
    assert [order.request_id for order in scheduler.fetcher.orders.values()] == ["a", "b"]


def test_an_item_larger_than_the_memory_passes_alone() -> None:
    scheduler = Scheduler(max_landed_bytes=100)
    side, first, second = scheduler.side, Request("a", [plain("a", 0)]), Request("b", [plain("b", 0)])
    assert not side.ensure_available(first, 0) and not side.ensure_available(second, 0)
    assert list(scheduler.fetcher.orders) == [0]
    side.finished("a")
    assert list(scheduler.fetcher.orders) == [0, 1]


def test_the_oldest_request_goes_on_when_younger_ones_hold_the_memory() -> None:
    """It has KV blocks that they may wait for."""
    scheduler = Scheduler(max_landed_bytes=320)
    side, old = scheduler.side, Request("old", [plain("x", 0), plain("y", 150)])
    young = [Request(name, [plain(name, 0)]) for name in "ab"]
    assert not side.ensure_available(old, 0)
    scheduler.fetcher.land(0)
    scheduler.fetcher.land(1)
    assert side.ensure_available(old, 0)
    assert not side.ensure_available(young[0], 0)
    assert list(scheduler.fetcher.orders) == [0, 1], "both items of the oldest fit, and no more"
    scheduler.load("x")
    assert side.ensure_available(old, 4)
    assert 2 in scheduler.fetcher.orders
    side.finished("old")
    assert not side.ensure_available(young[1], 0)
    old_again = Request("old", [plain("z", 0)])
    assert not side.ensure_available(old_again, 0)
    assert list(scheduler.fetcher.orders) == [0, 1, 2, 3], "now it is the youngest"


def test_what_the_oldest_requests_next_step_needs_passes_together() -> None:
    scheduler = Scheduler(max_landed_bytes=160)
    side = scheduler.side
    assert not side.ensure_available(Request("old", [plain("x", 0), plain("y", 50), plain("z", 500)]), 0)
    assert not side.ensure_available(Request("young", [plain("a", 0)]), 0)
    assert list(scheduler.fetcher.orders) == [0, 1], "x and y; z can wait, and so can the younger request"
