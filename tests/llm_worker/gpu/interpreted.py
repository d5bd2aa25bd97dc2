"""Triton's interpreter runs programs one by one: as few of them as can be, each with more to do."""

from __future__ import annotations

import pytest

_FEW_PROGRAMS = {
    "vitrine_vlm.llm_worker.gpu.step_tables.MAX_PROGRAMS": 16,
    "vitrine_vlm.llm_worker.gpu.tile_attention.MAX_PROGRAMS": 16,
    "vitrine_vlm.gpu_kernels.skinny_gemm._OUTPUTS_A_PROGRAM": 256,
    "vitrine_vlm.gpu_kernels.skinny_gemm._INPUTS_A_STEP": 128,
    "vitrine_vlm.gpu_kernels.rotary._PROGRAMS_A_HEAD": 2,
}


def run_few_programs(patch: pytest.MonkeyPatch) -> None:
    for name, value in _FEW_PROGRAMS.items():
        patch.setattr(name, value)
