"""Delivers events of the engine's thread on event loops, those of a step together, as waking a loop is costly."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from vitrine_vlm.llm_worker.engine.events import Event

_log = logging.getLogger(__name__)


class Subscriber(Protocol):
    """Receives the events of one request. loop: the one that `receive` is called on."""

    loop: asyncio.AbstractEventLoop

    def receive(self, event: Event) -> None: ...


class Outbox:
    """Holds a subscriber until `unsubscribe`, and until its last event is delivered. Belongs to the engine's thread."""

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
        """Has all events delivered that were put since the last call."""
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            for loop, events in waiting.items():
                send_now(loop, events)


def send_now(loop: asyncio.AbstractEventLoop, events: list[tuple[Subscriber, Event]]) -> None:
    """Has these events delivered on the loop. Safe on any thread."""
    try:
        loop.call_soon_threadsafe(_deliver, loop, events)
    except RuntimeError:
        _log.debug("an event loop is closed: %d events are discarded", len(events))


def _deliver(loop: asyncio.AbstractEventLoop, events: list[tuple[Subscriber, Event]]) -> None:
    for subscriber, event in events:
        try:
            subscriber.receive(event)
        except Exception as error:  # of one request, and must not reach the others
            loop.call_exception_handler(
                {"message": "a subscriber failed on an event of the engine", "exception": error}
            )
