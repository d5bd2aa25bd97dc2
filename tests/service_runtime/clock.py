"""A clock that tests set."""

from __future__ import annotations


class Clock:
    """now_s: what it shows, in seconds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s
