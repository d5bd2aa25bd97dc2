"""Several streams as one: everything arrives, the first error ends all, nothing that was read is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from embedding_transport.merge import merged


class Stream:
    """Yields numbers, then raises or waits for ever; notes that it was closed."""

    def __init__(self, *values: int, error: Exception | None = None, endless: bool = False) -> None:
        self.values, self.error, self.endless = values, error, endless
        self.closed = False

    async def __call__(self) -> AsyncGenerator[int]:
        try:
            for value in self.values:
                await asyncio.sleep(0)
                yield value
            if self.endless:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("streams", [[Stream(1, 2)], [Stream(1, 2), Stream(), Stream(3)]], ids=["one", "three"])
async def test_everything_arrives(streams: list[Stream]) -> None:
    dropped: list[int] = []
    assert sorted([value async for value in merged([each() for each in streams], dropped.append)]) == [
        *range(1, 1 + sum(len(each.values) for each in streams))
    ]
    assert not dropped


async def test_the_first_error_ends_all_streams() -> None:
    failing, endless = Stream(1, error=KeyError("bad")), Stream(2, 3, endless=True)
    taken: list[int] = []
    with pytest.raises(KeyError, match="bad"):
        async for value in merged([failing(), endless()], lambda value: None):
            taken.append(value)
    assert 1 in taken
    assert failing.closed and endless.closed


async def test_what_was_read_and_not_taken_is_dropped() -> None:
    first, second = Stream(1, 2, 3), Stream(4, endless=True)
    dropped: list[int] = []
    async with aclosing(merged([first(), second()], dropped.append)) as values:
        taken = [await anext(values)]
        await asyncio.sleep(0.01)
    assert sorted(taken + dropped) == [1, 2, 3, 4]
    assert first.closed and second.closed
