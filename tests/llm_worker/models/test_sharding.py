"""Each rank reads its part of the weights, and all parts together are the whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.rank_group import OneRank
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint, small_config

CPU = torch.device("cpu")
# By which dim parts are put together again; all other tensors are whole on every rank.
ROWS = (
    "q_proj.weight",
    "q_proj.bias",
    "k_proj.weight",
    "k_proj.bias",
    "v_proj.weight",
    "v_proj.bias",
    "lm_head.weight",
)
DIMS = {
    **dict.fromkeys([*ROWS, "mlp.gate_proj.weight", "mlp.up_proj.weight"], 0),
    "o_proj.weight": 1,
    "mlp.down_proj.weight": 1,
    "experts.down_proj": 2,
}


@dataclass
class PartOnly(OneRank):
    """A group that is sufficient for loading."""

    rank: int
    size: int


def load(folder: Path, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    return decoder(folder, rank, size).state_dict()


def decoder(folder: Path, rank: int, size: int) -> TextDecoder:
    return build_decoder(open_checkpoint(str(folder)), CPU, torch.float32, group=PartOnly(rank, size))


def whole_again(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name.endswith("experts.gate_up_proj"):
        return torch.cat([half for which in (0, 1) for half in (part.chunk(2, 1)[which] for part in parts)], 1)
    dim = next((dim for suffix, dim in DIMS.items() if name.endswith(suffix)), None)
    if dim is not None:
        return torch.cat(parts, dim)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def test_the_parts_are_the_whole(checkpoint_folder: Path) -> None:
    whole = load(checkpoint_folder)
    parts = [load(checkpoint_folder, rank, 2) for rank in range(2)]
    for name, tensor in whole.items():
        assert torch.equal(whole_again(name, [part[name] for part in parts]), tensor), name
    # Embeddings, norms and the experts' gate are there on every rank; the rest is cut in two.
    uncut = [name for name in whole if parts[0][name].numel() * 2 != whole[name].numel()]
    assert all("norm" in name or name.endswith(("embed_tokens.weight", "mlp.gate.weight")) for name in uncut)


def test_experts_in_the_released_layout(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path, "qwen3_vl_moe")
    expected = load(folder, 1, 2)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder, 1, 2).items())


def test_a_tied_head_is_its_part_of_the_embeddings(tmp_path: Path) -> None:
    config = small_config("qwen3_vl")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    loaded = decoder(save_random_checkpoint(tmp_path, "qwen3_vl", config=config), 1, 2)
    embeddings = loaded.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, embeddings[len(embeddings) // 2 :])
    assert loaded.lm_head.weight.untyped_storage().data_ptr() == embeddings.untyped_storage().data_ptr()


def test_dummy_weights_are_equal_where_all_ranks_have_them_whole(qwen3_vl_moe_folder: Path) -> None:
    checkpoint = open_checkpoint(str(qwen3_vl_moe_folder), load_format="dummy")
    one, other = (
        build_decoder(checkpoint, CPU, torch.float32, group=PartOnly(rank, 2)).state_dict() for rank in range(2)
    )
    whole = [name for name in one if "norm" in name or name.endswith(("embed_tokens.weight", "mlp.gate.weight"))]
    assert whole and all(torch.equal(one[name], other[name]) for name in whole)


def test_a_model_that_cannot_be_cut_is_refused_with_the_sizes_that_can(qwen3_vl_folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"--tp 4 .* num_attention_heads 6, num_key_value_heads 2: it can be 1 or 2"
    ):
        load(qwen3_vl_folder, 0, 4)


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path, "qwen3_vl")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.o_proj.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="o_proj"):
        load(folder, 0, 2)
