"""Events of the engine's thread on their way to event loops: all of a step's at once, as waking a loop costs more."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from vitrine_vlm.llm_worker.engine.events import Event

_log = logging.getLogger(__name__)


class Subscriber(Protocol):
    """Where the events of one request go. loop: the one that `receive` is called on."""

    loop: asyncio.AbstractEventLoop

    def receive(self, event: Event) -> None: ...


class Outbox:
    """Belongs to the engine's thread. Holds a subscriber until `unsubscribe`, and until its last event has arrived."""

    def __init__(self) -> None:
        self._subscribers: dict[int, Subscriber] = {}
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Subscriber, Event]]] = {}

    def subscribe(self, key: int, subscriber: Subscriber) -> None:
        self._subscribers[key] = subscriber

    def unsubscribe(self, key: int) -> None:
        """Later events of this request are discarded."""
        self._subscribers.pop(key, None)

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def put(self, key: int, event: Event) -> None:
        """The request's subscriber receives the event once `send` is called."""
        subscriber = self._subscribers.get(key)
        if subscriber is not None:
            self._waiting.setdefault(subscriber.loop, []).append((subscriber, event))

    def send(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            for loop, events in waiting.items():
                send_now(loop, events)


def send_now(loop: asyncio.AbstractEventLoop, events: list[tuple[Subscriber, Event]]) -> None:
    """From any thread."""
    try:
        loop.call_soon_threadsafe(_deliver, loop, events)
    except RuntimeError:
        _log.debug("an event loop is closed: %d events are discarded", len(events))


def _deliver(loop: asyncio.AbstractEventLoop, events: list[tuple[Subscriber, Event]]) -> None:
    for subscriber, event in events:
        try:
            subscriber.receive(event)
        except Exception as error:  # of one request, and nothing to the others
            loop.call_exception_handler({"message": "an event of the engine was not taken", "exception": error})
