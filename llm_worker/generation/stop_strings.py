"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from vitrine_vlm.errors import BadRequest

# Each token's text is compared with the beginnings of all. OpenAI's own limit is four strings.
MAX_STOP_STRINGS = 256
MAX_STOP_CHARS = 4096


def check_stop_strings(stop: Sequence[str]) -> None:
    """
    Raises:
        BadRequest: there are too many, or they are too long.
    """
    if len(stop) > MAX_STOP_STRINGS:
        raise BadRequest(f"stop has {len(stop)} strings: at most {MAX_STOP_STRINGS} are accepted: send fewer", "stop")
    if (num_chars := sum(map(len, stop))) > MAX_STOP_CHARS:
        raise BadRequest(
            f"stop has {num_chars} characters: its strings may have {MAX_STOP_CHARS} together: send shorter ones",
            "stop",
        )


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
        longest = 0
        for each in self._stop:
            start = max(0, len(self._held) - len(each) + 1)
            # Only ends that are longer than what is found already, and only where the string may begin.
            while 0 <= (start := self._held.find(each[0], start)) < len(self._held) - longest:
                if each.startswith(self._held[start:]):
                    longest = len(self._held) - start
                    break
                start += 1
        return longest
