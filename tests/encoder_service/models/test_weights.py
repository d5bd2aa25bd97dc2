"""Only visual tensors are read, all of them, and only from a checkpoint that matches its config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fp8_reference import dequantized_tensors
from vitrine_vlm.encoder_service.families import build_tower, family_of
from vitrine_vlm.encoder_service.models.weights import stored_dtype
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError, ChoosePart, open_checkpoint
from vitrine_vlm.sample_models.random_checkpoint import Fp8Layout, save_fp8_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def folder_copy(qwen2_5_vl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen2_5_vl_folder, tmp_path / "checkpoint"))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


class WatchedCheckpoint(Checkpoint):
    """Records the name of every tensor that is read."""

    names_read: list[str]

    def read_tensors(
        self,
        names: list[str],
        device: str | torch.device = "cpu",
        choose_part: ChoosePart = lambda name, shape: None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().read_tensors(names, device, choose_part):
            self.__dict__.setdefault("names_read", []).append(name)
            yield name, tensor


def test_only_visual_tensors_are_read(tower_folder: Path) -> None:
    checkpoint = open_checkpoint(str(tower_folder))
    watched = WatchedCheckpoint(checkpoint.folder, checkpoint.model, checkpoint.revision)
    progress: list[tuple[int, int]] = []
    build_tower(watched, CPU, torch.float32, lambda done, total: progress.append((done, total)))
    visual = {name for name in checkpoint.tensor_names() if "visual." in name}
    assert set(watched.names_read) == visual
    assert len(visual) < len(checkpoint.tensor_names()), "the checkpoint holds no language tensors to leave alone"
    assert progress == [(done, len(visual)) for done in range(1, len(visual) + 1)]


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_both_released_prefixes_load(folder_copy: Path, prefix: str) -> None:
    tensors = load_file(folder_copy / "model.safetensors")
    rewrite(folder_copy, {prefix + n.split("visual.", 1)[1]: t for n, t in tensors.items() if "visual." in n})
    assert build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32).row_width == 96


def test_a_missing_tensor_is_named(folder_copy: Path) -> None:
    tensors = load_file(folder_copy / "model.safetensors")
    rewrite(folder_copy, {n: t for n, t in tensors.items() if not n.endswith("merger.ln_q.weight")})
    with pytest.raises(CheckpointError, match=r"1 missing \['merger.ln_q.weight'\]"):
        build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32)


def test_an_unexpected_tensor_is_named(folder_copy: Path) -> None:
    tensors = load_file(folder_copy / "model.safetensors")
    prefix = next(n for n in tensors if "visual." in n).split("visual.")[0]
    rewrite(folder_copy, tensors | {f"{prefix}visual.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \['extra'\]"):
        build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32)


def test_two_tensors_for_one_place_are_named(qwen3_omni_moe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3_omni_moe_folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, tensors | {"thinker.visual.merger.norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"thinker\.visual\.merger\.\S+ and thinker\.visual\.merger\.\S+ in"):
        build_tower(open_checkpoint(str(folder)), CPU, torch.float32)


def test_a_tensor_of_another_shape_is_named(folder_copy: Path) -> None:
    tensors = load_file(folder_copy / "model.safetensors")
    name = next(n for n in tensors if n.endswith("merger.ln_q.weight"))
    rewrite(folder_copy, tensors | {name: torch.ones(63)})
    with pytest.raises(CheckpointError, match=r"ln_q.weight has shape \(63,\).*\(64,\)"):
        build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32)


def edit_config(folder: Path, **vision: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= vision
    config["vision_config"] = {name: value for name, value in config["vision_config"].items() if value is not None}
    path.write_text(json.dumps(config))


def test_the_released_spelling_of_the_channels_is_read(folder_copy: Path) -> None:
    edit_config(folder_copy, in_channels=None, in_chans=3, rope_parameters=None)
    build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"depth": None}, "no depth"),
        ({"depth": "four"}, "depth is 'four'"),
        ({"hidden_act": "relu6"}, "hidden_act is 'relu6'"),
        ({"num_heads": 7}, "does not split into 7 heads"),
        ({"window_size": 8}, "window_size 8 is smaller"),
    ],
)
def test_an_invalid_config_is_refused(folder_copy: Path, vision: dict[str, object], message: str) -> None:
    edit_config(folder_copy, **vision)
    with pytest.raises(CheckpointError, match=message):
        build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32)


def test_descending_deepstack_layers_are_refused(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3_vl_folder, tmp_path / "checkpoint"))
    edit_config(folder, deepstack_visual_indexes=[3, 1, 2])
    with pytest.raises(CheckpointError, match="ascending"):
        build_tower(open_checkpoint(str(folder)), CPU, torch.float32)


def test_the_vision_config_of_a_thinker_is_needed(qwen3_omni_moe_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3_omni_moe_folder, tmp_path / "checkpoint"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thinker_config": None}))
    with pytest.raises(CheckpointError, match="no thinker_config"):
        build_tower(open_checkpoint(str(folder)), CPU, torch.float32)


def test_deepstack_layers_that_a_family_does_not_have_are_not_read(qwen3_5_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen3_5_folder, tmp_path / "checkpoint"))
    edit_config(folder, deepstack_visual_indexes=[1, 2])
    assert build_tower(open_checkpoint(str(folder)), CPU, torch.float32).deepstack_visual_indexes == ()


def test_another_model_type_is_refused(folder_copy: Path) -> None:
    path = folder_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llava"}))
    with pytest.raises(CheckpointError, match="'llava' has no vision tower"):
        build_tower(open_checkpoint(str(folder_copy)), CPU, torch.float32)


@pytest.mark.parametrize("layout", ["block", "channel"])
@pytest.mark.parametrize("vision", [False, True])
def test_the_half_of_a_checkpoint_in_fp8(
    layout: Fp8Layout, vision: bool, qwen3_vl_folder: Path, tmp_path: Path
) -> None:
    folder = save_fp8_checkpoint(qwen3_vl_folder, tmp_path / "fp8", layout, vision=vision)
    checkpoint = open_checkpoint(str(folder))
    weights = family_of(checkpoint).weights
    assert stored_dtype(checkpoint, weights) == torch.float32
    loaded = build_tower(checkpoint, CPU, torch.float32).state_dict()
    expected = dequantized_tensors(folder)
    assert all(torch.equal(loaded[name], expected[stored]) for name, stored in weights.names(checkpoint).items())
    assert len(load_file(folder / "model.safetensors")) > len(expected)


def test_another_quantization_of_the_language_half_does_not_matter(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_vl_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert build_tower(open_checkpoint(str(tmp_path)), CPU, torch.float32)
