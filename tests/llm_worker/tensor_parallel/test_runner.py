"""Two ranks compute the same as one, with any runner.

On two GPUs over NCCL, also in CUDA graphs; without any over gloo, with kernels in Triton's interpreter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

pytest.importorskip("triton", reason="Triton is not installed")
from tests.llm_worker.tensor_parallel import rank_of_runner

NUM_GPUS = torch.cuda.device_count()
# Experts, which have dense layers among them here, do not run in graphs; the interpreter is too slow for more than one.
FAMILIES = ["qwen3_vl", "qwen2_5_vl"] if NUM_GPUS else ["qwen3_vl_moe"]


@pytest.mark.skipif(NUM_GPUS == 1, reason="needs two NVIDIA GPUs, or none")
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_two_ranks_compute_what_one_does(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint_folder: Path = request.getfixturevalue(f"{family}_folder")
    arguments = [str(tmp_path / "store"), str(checkpoint_folder), str(tmp_path / "out")]
    command = [sys.executable, "-m", rank_of_runner.__name__]
    ranks = [subprocess.Popen([*command, str(rank), *arguments]) for rank in range(2)]
    try:
        assert [rank.wait(150) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = load_file(tmp_path / "out")
    device = torch.device("cuda" if NUM_GPUS else "cpu")
    whole = build_decoder(open_checkpoint(str(checkpoint_folder)), device, torch.float32)
    expected = rank_of_runner.hidden_states(whole, "plain")
    assert len(found) == len(expected) * (3 if NUM_GPUS else 2)
    for name, hidden_TC in found.items():
        torch.testing.assert_close(
            hidden_TC,
            expected[int(name[-1])].cpu(),
            atol=5e-5,
            rtol=1e-4,
            msg=f"{name}: {{}}".format,
        )
