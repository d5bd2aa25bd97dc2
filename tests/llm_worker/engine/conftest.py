"""Requests to the small Qwen3-VL, with the inputs that transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_parity import CASES
from tests.llm_worker.engine.harness import Request, request_for
from vitrine_vlm.sample_models.reference import Reference

FACTOR = 32  # pixels along a merged token of the small Qwen3-VL


@pytest.fixture(scope="module")
def reference(qwen3_vl_folder: Path) -> Reference:
    return Reference(qwen3_vl_folder)


@pytest.fixture
def image(reference: Reference) -> Request:
    return request_for(reference, CASES["one_image"].text, CASES["one_image"].media(FACTOR))


@pytest.fixture
def text(reference: Reference) -> Request:
    return request_for(reference, CASES["text_only"].text, [])
