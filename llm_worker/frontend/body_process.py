"""The process that reads a worker's large bodies: `python -m vitrine_vlm.llm_worker.frontend.body_process`."""

from __future__ import annotations

from typing import Any

from vitrine_vlm.llm_worker.frontend.json_body import read_media
from vitrine_vlm.service_runtime.body_process import Keep, answer_bodies


def _read(body: bytes, arguments: dict[str, Any], keep: Keep) -> dict[str, Any]:
    return read_media(body, keep)


if __name__ == "__main__":
    answer_bodies(_read)
