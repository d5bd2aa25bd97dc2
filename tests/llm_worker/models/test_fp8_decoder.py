"""Decoders from checkpoints in FP8, and from others that are quantized at load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.fp8_reference import save_dequantized
from tests.integration.test_parity import CASES
from tests.llm_worker.engine.harness import collect, greedy, request_for, running_engine, submit
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.rank_group import OneRank
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import Fp8Layout, save_fp8_checkpoint
from vitrine_vlm.sample_models.reference import Reference

CPU = torch.device("cpu")
LAYOUTS: tuple[Fp8Layout, ...] = ("block", "channel")
NUM_TOKENS = 12


@dataclass
class PartOnly(OneRank):
    """A group that is sufficient for loading."""

    rank: int
    size: int


def load(folder: Path, dtype: torch.dtype = torch.float32) -> TextDecoder:
    return build_decoder(open_checkpoint(str(folder)), CPU, dtype)


@pytest.fixture(params=LAYOUTS)
def fp8_folder(request: pytest.FixtureRequest, checkpoint_folder: Path, tmp_path: Path) -> Path:
    return save_fp8_checkpoint(checkpoint_folder, tmp_path / "fp8", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_dequantized(fp8_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = load(save_dequantized(fp8_folder, tmp_path / "plain"), dtype).state_dict()
    found = load(fp8_folder, dtype).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) and tensor.dtype == dtype for name, tensor in found.items())


async def test_answers_equal_those_of_transformers_with_dequantized_weights(fp8_folder: Path, tmp_path: Path) -> None:
    reference = Reference(save_dequantized(fp8_folder, tmp_path / "plain"))
    vision = reference.config.vision_config
    case = CASES["one_image"]
    request = request_for(reference, case.text, case.media(vision.patch_size * vision.spatial_merge_size))
    expected_ids, expected_logprobs = reference.greedy(request.inputs, NUM_TOKENS)
    with running_engine(fp8_folder, max_num_batched_tokens=48) as engine:
        outputs = await collect(submit(engine, request, greedy(NUM_TOKENS, logprobs=1)))
    assert [output.token_id for output in outputs] == expected_ids
    for step, output in enumerate(outputs):
        assert output.logprobs is not None
        for token_id, logprob in output.logprobs.top:
            assert logprob == pytest.approx(float(expected_logprobs[step, token_id]), abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_ranks_read_their_parts(layout: Fp8Layout, family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(f"{family}_folder")
    folder = save_fp8_checkpoint(source, tmp_path / "fp8", layout, block=(8, 8))
    plain = save_dequantized(folder, tmp_path / "plain")
    for rank in range(2):
        found, expected = (
            build_decoder(open_checkpoint(str(each)), CPU, torch.float32, group=PartOnly(rank, 2)).state_dict()
            for each in (folder, plain)
        )
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_ranks_that_would_share_a_block_are_refused(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path, "block", block=(128, 128))
    with pytest.raises(CheckpointError, match="lower --tp"):
        build_decoder(open_checkpoint(str(folder)), CPU, torch.float32, group=PartOnly(0, 2))


def test_other_checkpoints_are_quantized_at_load(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(str(checkpoint_folder))
    plain = build_decoder(checkpoint, CPU, torch.float32).state_dict()
    quantized = build_decoder(checkpoint, CPU, torch.float32, quantization="fp8").state_dict()
    changed = {name for name, tensor in quantized.items() if not torch.equal(tensor, plain[name])}
    assert changed == {name for name in plain if name.endswith("_proj.weight")}
    for name in changed:
        error = (quantized[name] - plain[name]).norm() / plain[name].norm()
        assert 0.01 < error < 0.04 and F.cosine_similarity(quantized[name], plain[name]).min() > 0.998, name


def test_a_checkpoint_in_fp8_is_not_quantized_again(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path, "block")
    checkpoint, expected = open_checkpoint(str(folder)), load(folder).state_dict()
    found = build_decoder(checkpoint, CPU, torch.float32, quantization="fp8").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
