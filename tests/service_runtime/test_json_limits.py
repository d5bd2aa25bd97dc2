"""Bodies that a parser would hold the interpreter with are refused unread; what stands in strings does not count."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress

import pytest
from pydantic_core import from_json

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime import json_limits
from vitrine_vlm.service_runtime.json_limits import check_json, num_values


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"MAX_VALUES": 150, "MAX_NAMES": 50, "MAX_ESCAPES": 60, "MAX_BYTES_OUTSIDE_STRINGS": 2000}
    limits |= {"MAX_STRINGS": 120, "_SMALL_BYTES": 10, "_MIDDLE_BYTES": 1000, "_SLICE_BYTES": 7}
    for name, value in limits.items():
        monkeypatch.setattr(json_limits, name, value)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (json.dumps([1] * 151), "more than 150 values"),
        ("[" * 500, "more than 150 values"),
        ('{"a":' * 151, "more than 50 names"),
        (json.dumps(["a" * 10] * 121), "more than 120 strings"),
        (json.dumps(["a" * 1000, int("9" * 401)]), "a number of more than 400 digits"),
        (json.dumps({f"k{index}": 1 for index in range(51)}), "more than 50 names of fields"),
        (json.dumps([*["9" * 10] * 50, int("9" * 401)]), "a number of more than 400 digits"),
        ("[" + "9 " * 1001 + "]", "more than 2000 bytes outside"),
        (json.dumps(["a", " " * 9]) + " " * 2000, "more than 2000 bytes outside"),
        (json.dumps("é" * 61), "61 escapes"),
        ('"' + "\\" * 61, "61 escapes"),
    ],
)
def test_what_is_refused(body: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_json(body.encode())
    assert any(each in str(caught.value) for each in message.split("|"))


@pytest.mark.usefixtures("small_limits")
def test_what_passes() -> None:
    check_json(json.dumps([1] * 149).encode())  # the list is a value, too
    check_json(json.dumps(["a" * 1000, *[int("9" * 400)] * 4]).encode())
    check_json(json.dumps({f"k{index}": ",:[{" * 999 for index in range(50)}, ensure_ascii=False).encode())
    check_json(json.dumps(['a,b"' * 10, "\\" * 10, ',:"']).encode())
    check_json(b'"never ends, ' + b"x" * 3000)  # the parser says so


@pytest.mark.usefixtures("small_limits")
def test_random_texts_are_counted_as_the_parser_sees_them() -> None:
    """A body just at the limit passes, and one just above it does not, wherever quotes, escapes and slices fall."""
    random_ = random.Random(3)
    for _ in range(300):
        names = ["".join(random_.choices('ab\\",:[{é', k=random_.randrange(5))) + str(index) for index in range(50)]
        values = {name: random_.choice(["", '"', "\\", ",,", 1, "x"]) for name in names}
        body = json.dumps(values, ensure_ascii=False, separators=random_.choice([(",", ":"), (", ", ": ")]))
        if body.count("\\") > 60:
            continue
        assert len(from_json(body)) == 50
        check_json(body.encode())
        with pytest.raises(BadRequest, match="names"):
            check_json((body[:-1] + ', "one more": 1}').encode())


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({f"field_{index}": {"type": "string"} for index in range(150_000)}),
        json.dumps([{"role": "user", "content": "a"}] * 100_000),
        "[" + ",".join(["9" * 400] * 19_000) + "]",
        '{"a": "' + '\\"' * 500_000 + '", "b": ' + '"\\\\",' * 100_000,
    ],
    ids=["names", "strings", "numbers of as many digits as are accepted", "escapes"],
)
def test_a_body_is_looked_through_in_little_time(body: str) -> None:
    """A loop over names or strings took 0.2 s of the interpreter, and numbers 4.7 s."""
    begin = time.thread_time()
    with suppress(BadRequest):
        check_json(body.encode())
    assert time.thread_time() - begin < 0.15


@pytest.mark.usefixtures("small_limits")
def test_the_number_of_values_is_an_upper_bound() -> None:
    assert num_values(b"{}", 100) >= 1
    assert num_values(json.dumps([[1, 2], {"a": "b,c"}]).encode(), 100) >= 5
    assert 10 < num_values(b"," * 1000, 10) < 30
