"""A process that reads bodies as `test_body_reader.py` says: `python -m tests.service_runtime.body_process_to_end`."""

from __future__ import annotations

import os
import time
from typing import Any

from vitrine_vlm.errors import TooManyItems
from vitrine_vlm.service_runtime import body_process
from vitrine_vlm.service_runtime.body_process import Keep, answer_bodies


def _read(body: bytes, arguments: dict[str, Any], keep: Keep) -> Any:
    match arguments["do"]:
        case "spin":
            while True:
                pass
        case "stop":
            while True:
                time.sleep(60)
        case "try":  # to take a lock, again and again, and compute a little
            while True:
                time.sleep(0.02)
                sum(range(2000))
        case "grow":
            return [bytes(2**26) for _ in range(64)]
        case "fault":
            return body[arguments["index"]]
        case "refuse":
            raise TooManyItems("more than 0 items", "items")
    return {"pid": os.getpid(), "nice": os.nice(0), "kept": [keep(body[::-1]), keep(body)]}


if __name__ == "__main__":
    body_process.MAX_CPU_S = 0.5
    answer_bodies(_read)
