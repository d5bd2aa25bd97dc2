"""Calls of a client that does not read on: their answers are on the way, or lie in gRPC's buffers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


class UnreadCall:
    """A call whose answers are read up to one of them; what follows stays unread until the call has ended."""

    def __init__(self, call: Any, is_last: Callable[[bytes], bool]) -> None:
        self._call = call
        self._is_last = is_last
        self._reads_on = True

    async def read(self) -> object:
        if not self._reads_on:
            await self._call.code()
        raw = await self._call.read()
        self._reads_on = not (isinstance(raw, bytes) and self._is_last(raw))
        return raw

    def cancel(self) -> None:
        self._call.cancel()


def read_up_to(
    is_last: Callable[[bytes], bool], monkeypatch: pytest.MonkeyPatch, module: ModuleType, method: str
) -> None:
    """Has calls of a method read no answer behind the first for which `is_last` is true.

    Args:
        module, method: of the client, where it finds the method to call.
    """
    make = getattr(module, method)

    def make_unread(channel: object) -> Callable[..., UnreadCall]:
        call = make(channel)
        return lambda *message, **options: UnreadCall(call(*message, **options), is_last)

    monkeypatch.setattr(module, method, make_unread)
