"""The time that a finished request spent in each stage, for answers, traces, metrics and the live page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vitrine_vlm.llm_worker.engine.request import EngineTimings
from vitrine_vlm.llm_worker.generation.events import StageTimings
from vitrine_vlm.types import ItemTimings


@dataclass(frozen=True)
class ItemArrival:
    """The embeddings of a media item have come. arrived_ms: since the request's arrival."""

    item_index: int
    timings: ItemTimings
    arrived_ms: float


@dataclass(frozen=True)
class Stage:
    """A stage of a request. start_ms: since the request's arrival. item_index: None for stages of the whole request."""

    name: str
    item_index: int | None
    start_ms: float
    duration_ms: float


def stage_timings(arrivals: Sequence[ItemArrival], engine: EngineTimings) -> StageTimings:
    """Sums the stages up: of items, the slowest one counts."""
    items = [arrival.timings for arrival in arrivals]
    return StageTimings(
        load_ms=max((item.load_ms for item in items), default=0.0),
        preprocess_ms=max((item.preprocess_ms for item in items), default=0.0),
        encode_ms=max((item.queue_ms + item.forward_ms for item in items), default=0.0),
        ship_ms=max((item.export_ms + item.ship_ms for item in items), default=0.0),
        land_ms=engine.land_ms,
        prefill_ms=engine.prefill_ms,
        decode_ms=engine.decode_ms,
        ttft_ms=engine.ttft_ms,
    )


def stages(arrivals: Sequence[ItemArrival], engine: EngineTimings, ended_ms: float) -> list[Stage]:
    """Returns the stages on one time axis.

    Encoders report how long their stages took, not when they began: these are placed backwards from the item's arrival.

    Args:
        ended_ms: when the last token came, since the request's arrival.
    """
    found = [stage for arrival in arrivals for stage in _item_stages(arrival)]
    first_token_ms = ended_ms - engine.decode_ms
    prefill_start_ms = first_token_ms - engine.prefill_ms
    if engine.land_ms:
        found.append(Stage("land", None, prefill_start_ms, engine.land_ms))
    found.append(Stage("prefill", None, prefill_start_ms, engine.prefill_ms))
    found.append(Stage("decode", None, first_token_ms, engine.decode_ms))
    return found


def _item_stages(arrival: ItemArrival) -> Iterator[Stage]:
    timings = arrival.timings
    durations = {
        "load": timings.load_ms,
        "preprocess": timings.preprocess_ms,
        "queue": timings.queue_ms,
        "forward": timings.forward_ms,
        "ship": timings.export_ms + timings.ship_ms,
    }
    start_ms = arrival.arrived_ms - sum(durations.values())
    for name, duration_ms in durations.items():
        yield Stage(name, arrival.item_index, start_ms, duration_ms)
        start_ms += duration_ms
