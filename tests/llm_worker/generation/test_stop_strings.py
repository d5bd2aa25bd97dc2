"""Stop strings are found wherever the text happens to be cut."""

from __future__ import annotations

import random

import pytest

from vitrine_vlm.llm_worker.generation.stop_strings import StopStrings


def direct(text: str, stop: list[str]) -> str:
    """The expected text: everything in front of the stop string that is complete first."""
    for end in range(len(text) + 1):
        lengths = [len(each) for each in stop if text[:end].endswith(each)]
        if lengths:
            return text[: end - max(lengths)]
    return text


def test_any_cut_of_the_text_gives_what_a_direct_search_gives() -> None:
    rng = random.Random(0)
    num_found = 0
    for _ in range(3000):
        text = "".join(rng.choice("ab\n") for _ in range(rng.randint(0, 20)))
        stop = ["".join(rng.choice("ab\n") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        watcher, out, rest = StopStrings(stop), "", text
        while rest and not watcher.found:
            cut = rng.randint(0, 4)
            out, rest = out + watcher.push(rest[:cut]), rest[cut:]
            if not watcher.found:
                # No text may be returned that could still become part of a stop string.
                assert direct(text, stop).startswith(out)
        out += watcher.flush()
        num_found += watcher.found
        assert out == direct(text, stop)
    assert 500 < num_found < 2500


def test_text_is_held_back_no_longer_than_needed() -> None:
    watcher = StopStrings(["###"])
    assert watcher.push("a#") == "a"
    assert watcher.push("#b") == "##b"
    assert watcher.push("c") == "c"


@pytest.mark.parametrize("stop", [[], [""]])
def test_without_stop_strings_everything_passes(stop: list[str]) -> None:
    watcher = StopStrings(stop)
    assert watcher.push("hello") == "hello"
    assert watcher.flush() == ""


def test_stop_strings_that_end_too_early_are_text() -> None:
    """As with vLLM's min_tokens: one that begins in this text and ends later counts."""
    watcher = StopStrings(["ab", "bcd"])
    assert watcher.push("xab", may_stop=False) + watcher.push("ab", may_stop=False) == "xaba"
    assert watcher.push("c") == "" and not watcher.found
    assert watcher.push("d") == "" and watcher.found


def test_an_included_stop_string_is_passed_on_and_nothing_behind_it() -> None:
    watcher = StopStrings(["abc", "b"], include=True)
    assert watcher.push("xa") + watcher.push("bcd") == "xab" and watcher.found
    assert watcher.push("e") + watcher.flush() == ""
