"""Each decoder of bytes that a stranger sends: valid inputs, changed in every way, raise errors with a code at most.

`make fuzz` does the same for as long as wanted, led by what of the code an input reaches.
"""

from __future__ import annotations

import functools
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

MAX_CPU_S = 3.0
MAX_GROWTH_KIB = 512 * 1024
# Few where an execution takes milliseconds.
EXAMPLES = {"video": 15, "picture": 60, "encode_request": 60, "chat_json": 40, "connect": 50, "encode_responses": 60}


@functools.cache
def valid_inputs() -> dict[str, list[bytes]]:
    return seeds()


def changed(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """`data` with pieces replaced: each edit is a place, a number of bytes that go, and the bytes that come."""
    for place, num_bytes, piece in edits:
        start = int(place * len(data))
        data = data[:start] + piece + data[start + num_bytes :]
    return data


INTERESTING = st.sampled_from(
    [b"\0", b"\xff", b"\xff" * 4, b"\xff" * 9 + b"\x01", b"[", b"{", b'"', b"1e999", b"\\ud800"]
)
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 16), st.one_of(INTERESTING, st.binary(max_size=8))), max_size=4
)


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_that_are_changed(name: str) -> None:
    target, inputs = TARGETS[name], valid_inputs()[name]
    for data in inputs:  # which also loads what is loaded once
        target(data)
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=EXAMPLES.get(name, 150))
    @given(st.one_of(st.binary(max_size=200), st.builds(changed, st.sampled_from(inputs), EDITS)))
    def runs(data: bytes) -> None:
        began = time.process_time()
        target(data)
        assert time.process_time() - began < MAX_CPU_S

    runs()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < MAX_GROWTH_KIB
