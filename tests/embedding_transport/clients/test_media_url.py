"""Media items from URLs; tests/llm_worker/frontend/test_openai_types.py has malformed ones in requests."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable
from functools import partial

from vitrine_vlm.embedding_transport.clients.media_url import decode_base64


def test_base64_is_decoded_as_by_the_standard_library() -> None:
    def outcome(decode: Callable[[str], bytes], payload: str) -> object:
        try:
            return decode(payload)
        except ValueError as error:
            return type(error), str(error)

    made = ["".join(characters) for length in range(6) for characters in itertools.product("AQ/=-\n", repeat=length)]
    made += ["".join(characters) for characters in itertools.product("Q/=_", repeat=8) if characters[0] == "Q"]
    encoded = base64.b64encode(bytes(range(256))).decode()
    for payload in (*made, encoded, encoded * 2, encoded.rstrip("="), encoded.replace("/", "_"), "é" * 4, "QUJé"):
        assert outcome(decode_base64, payload) == outcome(partial(base64.b64decode, validate=True), payload)
