"""Triton's interpreter runs programs one by one: as few of them as can be, each with more to do."""

from __future__ import annotations

import pytest

_FEW_PROGRAMS = {
    "step_tables.MAX_PROGRAMS": 16,
    "tile_attention.MAX_PROGRAMS": 16,
    "few_rows._OUTPUTS_A_PROGRAM": 256,
    "few_rows._INPUTS_A_STEP": 128,
    "kernels._PROGRAMS_A_HEAD": 2,
}


def run_few_programs(patch: pytest.MonkeyPatch) -> None:
    for name, value in _FEW_PROGRAMS.items():
        patch.setattr(f"llm_worker.gpu.{name}", value)
