"""The language half of a checkpoint is loaded whole, strictly, and nothing else is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrine_vlm.llm_worker.families import build_decoder, text_config
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.weights import stored_dtype
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint, small_config

CPU = torch.device("cpu")


def load(folder: Path) -> TextDecoder:
    return build_decoder(open_checkpoint(str(folder)), CPU, torch.float32)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors")


def test_no_visual_tensor_is_read(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_tensors = Checkpoint.read_tensors

    def watched(self: Checkpoint, names: list[str], *arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        read.extend(names)
        return read_tensors(self, names, *arguments)

    monkeypatch.setattr(Checkpoint, "read_tensors", watched)
    decoder = load(checkpoint_folder)
    assert read and not [name for name in read if "visual" in name]
    stored = open_checkpoint(str(checkpoint_folder)).tensor_names()
    assert sorted(read) == sorted(name for name in stored if "visual" not in name)
    assert not [name for name, tensor in decoder.named_parameters() if tensor.is_meta]


def test_released_expert_layout_equals_the_transposed_one(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path, "qwen3_vl_moe")
    expected = load(folder).state_dict()
    experts = {name: each for name, each in load_file(folder / "model.safetensors").items() if ".experts." in name}
    assert experts
    rewrite(folder, {name: tensor.transpose(1, 2) for name, tensor in experts.items()})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).state_dict().items())


def test_tied_embeddings_share_one_tensor(tmp_path: Path) -> None:
    config = small_config("qwen3_vl")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    decoder = load(save_random_checkpoint(tmp_path, "qwen3_vl", config=config))
    assert decoder.lm_head.weight.data_ptr() == decoder.embed_tokens.weight.data_ptr()


def test_tying_is_read_from_the_whole_models_config(tmp_path: Path) -> None:
    config = small_config("qwen3_vl")
    config.text_config.tie_word_embeddings = True
    folder = save_random_checkpoint(tmp_path, "qwen3_vl", config=config)
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load(folder).lm_head.weight, stored)


def test_shards_hold_the_same_weights(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    folder = save_random_checkpoint(tmp_path, "qwen3_vl", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = load(qwen3_vl_folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).state_dict().items())


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    changes: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({name: None}, name),
        ({name: torch.zeros(3, 3)}, rf"{name} has shape \(3, 3\)"),
        ({"model.language_model.layers.1.mlp.extra.weight": torch.zeros(1)}, "extra"),
    ]
    for change, says in changes:
        folder = save_random_checkpoint(tmp_path, "qwen3_vl")
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=says):
            load(folder)


def test_a_model_whose_weights_have_other_names_is_named(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path, "qwen3_vl")
    tensors = load_file(folder / "model.safetensors")
    assert stored_dtype(open_checkpoint(str(folder))) == torch.float32
    save_file({name.replace("layernorm", "norm"): each for name, each in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"input_layernorm.*'qwen3_vl'"):
        stored_dtype(open_checkpoint(str(folder)))


def config_of(tmp_path: Path, config: dict[str, object]) -> Checkpoint:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(str(tmp_path))


def test_config_spelled_as_qwen3_vl_8b(tmp_path: Path) -> None:
    text = {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    }
    vision = {"deepstack_visual_indexes": [8, 16, 24]}
    config = text_config(config_of(tmp_path, {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}))
    assert (config.rope_theta, config.mrope_section, config.mrope_interleaved) == (5e6, (24, 20, 20), True)
    assert (config.num_deepstack, config.qk_norm, config.qkv_bias, config.moe) == (3, True, False, None)

    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    moe_text = text | experts | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    moe = text_config(
        config_of(tmp_path, {"model_type": "qwen3_vl_moe", "text_config": moe_text, "vision_config": vision})
    ).moe
    assert moe is not None
    assert (moe.num_experts, moe.sparse_layers) == (128, frozenset(range(36)))


def test_config_spelled_as_qwen2_5_vl_7b(tmp_path: Path) -> None:
    flat = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vision_config": {"depth": 32},
        "vocab_size": 152064,
    }
    config = text_config(config_of(tmp_path, flat))
    assert (config.head_dim, config.mrope_section, config.mrope_interleaved) == (128, (16, 24, 24), False)
    assert (config.num_deepstack, config.qk_norm, config.qkv_bias) == (0, False, True)

    flat["rope_scaling"] = {"type": "yarn", "mrope_section": [16, 24, 24]}
    with pytest.raises(CheckpointError, match="yarn"):
        text_config(config_of(tmp_path, flat))
    del flat["hidden_size"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    with pytest.raises(CheckpointError, match="hidden_size"):
        text_config(config_of(tmp_path, flat))
