"""A worker answers probes while it reads the largest bodies and texts that it takes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection

import pytest

from tests.integration.fleet import Fleet
from vitrine_vlm.service_runtime.json_limits import MAX_ESCAPES, MAX_NAMES, MAX_VALUES

# On a machine that does nothing else it is 0.2 s; other tests beside this one make it longer.
LONGEST_WAIT_S = 1.0
_TRIES = 3  # a pause of the machine is none of the worker's
_KIB = 1024


class Probe:
    """Asks for /health every 20 ms until the end of the context. waits: of each answer, seconds."""

    def __init__(self, address: str) -> None:
        self.waits: list[float] = []
        self._address = address
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        connection = HTTPConnection(self._address, timeout=60)
        while not self._ended.wait(0.02):
            begin = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.waits.append(time.monotonic() - begin)
        connection.close()


def waits_for_health(address: str, work: Callable[[], None]) -> list[float]:
    """The longest wait beside the work of each try, up to the first one that is short enough."""
    longest: list[float] = []
    while len(longest) < _TRIES and not (longest and longest[-1] < LONGEST_WAIT_S):
        with Probe(address) as probe:
            work()
            time.sleep(0.1)
        longest.append(max(probe.waits))
    return longest


def post(address: str, path: str, body: bytes) -> tuple[int, bytes]:
    connection = HTTPConnection(address, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer


@pytest.mark.parametrize("has_text", [True, False])
def test_health_is_answered_during_the_largest_bodies(small_fleet: Fleet, has_text: bool) -> None:
    address = small_fleet.worker_processes["shm"].addresses["http"]
    # Two bytes of UTF-8 a character, an escape for every second one; only its end is used.
    text = "é " * (1000 * _KIB // 2) if has_text else "Hello"
    fields = {"model": small_fleet.folder.name, "prompt": text, "max_tokens": 1, "truncate_prompt_tokens": 5}
    unknown = {f"unknown_{index}": 1 for index in range(MAX_NAMES - 100)}
    values = {"values": [1] * (MAX_VALUES - 2 * MAX_NAMES)}
    body = json.dumps(fields | ({} if has_text else unknown) | values).encode()
    assert body.count(b"\\") < MAX_ESCAPES

    def work() -> None:
        status, answer = post(address, "/v1/completions", body)
        assert status == 200, answer
        assert json.loads(answer)["usage"]["prompt_tokens"] == 5

    waits = waits_for_health(address, work)
    assert waits[-1] < LONGEST_WAIT_S, waits


def test_health_is_answered_while_a_text_that_cannot_fit_is_refused(small_fleet: Fleet) -> None:
    address = small_fleet.worker_processes["shm"].addresses["http"]
    body = {"model": small_fleet.folder.name, "messages": [{"role": "user", "content": "What is this? " * 500 * _KIB}]}

    def work() -> None:
        begin = time.monotonic()
        status, answer = post(address, "/v1/chat/completions", json.dumps(body).encode())
        assert time.monotonic() - begin < 10  # to tokenize 7 MB took 20 s
        assert (status, json.loads(answer)["error"]["code"]) == (400, "context_length_exceeded")

    waits = waits_for_health(address, work)
    assert waits[-1] < LONGEST_WAIT_S, waits
