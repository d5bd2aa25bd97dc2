"""The process that reads a gateway's large bodies: `python -m vitrine_vlm.gateway.body_process`."""

from __future__ import annotations

from typing import Any

from vitrine_vlm.gateway.media_parts import parse_chat
from vitrine_vlm.service_runtime.body_process import Keep, answer_bodies


def _read(body: bytes, arguments: dict[str, Any], keep: Keep) -> dict[str, Any]:
    return parse_chat(body, **arguments).to_json(keep)


if __name__ == "__main__":
    answer_bodies(_read)
