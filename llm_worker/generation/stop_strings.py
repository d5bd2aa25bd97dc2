"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and holds back an end that may yet become one.

    found: whether a stop string has come.

    Args:
        include: whether the stop string is passed on, too.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = [each for each in stop if each]
        self._include = include
        self._held = ""
        self.found = False

    def push(self, text: str, may_stop: bool = True) -> str:
        """Returns the text that is certain by now: up to the first stop string, and nothing after it was found.

        Args:
            may_stop: whether a stop string that this text completes counts; one that it begins counts in any case.
        """
        if self.found:
            return ""
        self._held += text
        # The stop string that is complete first ends the text, however the text was cut; of several, the longest.
        found = [(start + len(each), start) for each in self._stop if (start := self._held.find(each)) >= 0]
        if found and may_stop:
            self.found = True
            end, start = min(found)
            return self._held[: end if self._include else start]
        certain = len(self._held) - self._longest_beginning()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def flush(self) -> str:
        """Returns what was held back, when no more text comes."""
        text, self._held = self._held, ""
        return "" if self.found else text

    def _longest_beginning(self) -> int:
        """Returns the length of the longest end of the held text that a stop string begins with, and is longer than."""
        longest = max((len(each) for each in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(each.startswith(end) and each != end for each in self._stop):
                return length
        return 0
