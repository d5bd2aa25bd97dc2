"""Finding, identifying and reading checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import pytest
import torch

from vitrine_vlm.model_loading import weight_hashes
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.model_loading.weight_hashes import hash_files
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint


def test_a_sharded_checkpoint_reads_like_a_whole_one(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    sharded = open_checkpoint(str(save_random_checkpoint(tmp_path / "sharded", "qwen3_vl", max_shard_size="300KB")))
    whole = open_checkpoint(str(qwen3_vl_folder))
    assert len(set(sharded.tensor_names().values())) > 1
    names = list(whole.tensor_names())
    assert set(names) == set(sharded.tensor_names())
    tensors = dict(sharded.read_tensors(names))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.read_tensors(names))


@pytest.mark.parametrize(
    "elsewhere", ["../elsewhere.safetensors", "/elsewhere.safetensors", "..", "", "config.json", 5, None]
)
def test_an_index_cannot_point_outside_the_folder(tmp_path: Path, elsewhere: object) -> None:
    folder = save_random_checkpoint(tmp_path / "sharded", "qwen3_vl", max_shard_size="300KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = elsewhere
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=re.escape(repr(elsewhere))):
        open_checkpoint(str(folder)).tensor_names()


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": ["a.safetensors"]}', "[]", "{"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError):
        open_checkpoint(str(tmp_path)).tensor_names()


@pytest.mark.parametrize("nbytes", [0, 100, 100_000])
@pytest.mark.parametrize("max_shard_size", ["300KB", "1GB"])
def test_a_file_that_was_not_copied_to_its_end_is_named(tmp_path: Path, max_shard_size: str, nbytes: int) -> None:
    folder = save_random_checkpoint(tmp_path / "cut", "qwen3_vl", max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(str(folder))
    names = list(checkpoint.tensor_names())
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:nbytes])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        list(checkpoint.read_tensors(names))


def test_a_file_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path / "incomplete", "qwen3_vl", max_shard_size="300KB")
    checkpoint = open_checkpoint(str(folder))
    path = sorted(folder.glob("*.safetensors"))[0]
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        list(checkpoint.read_tensors(list(checkpoint.tensor_names())))


def test_revision_tells_weights_apart_and_not_places(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    copy = tmp_path / qwen3_vl_folder.name
    shutil.copytree(qwen3_vl_folder, copy)
    other = save_random_checkpoint(tmp_path / "other", "qwen3_vl", seed=1)
    first, same, different = (open_checkpoint(str(folder)) for folder in (qwen3_vl_folder, copy, other))
    assert (first.model, first.revision) == (same.model, same.revision)
    assert first.revision != different.revision
    assert open_checkpoint(str(copy), served_model_name="mine").model == "mine"


def changed_byte(path: Path, position: int) -> None:
    """Changes one byte in place, and not the file's size or its time of modification."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_revision_sees_every_byte_of_the_weights(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    folder = tmp_path / "changing"
    shutil.copytree(qwen3_vl_folder, folder)
    path = folder / "model.safetensors"
    revisions = [open_checkpoint(str(folder)).revision]
    for position in (0, 70_000, path.stat().st_size // 2 + 1, path.stat().st_size - 1):
        changed_byte(path, position)
        revisions.append(open_checkpoint(str(folder)).revision)
    assert len(set(revisions)) == 5
    changed_byte(path, path.stat().st_size - 1)
    assert open_checkpoint(str(folder)).revision == revisions[-2]
    assert open_checkpoint(str(folder)).start_hashing()() == revisions[-2]


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache, read = tmp_path / "a.safetensors", tmp_path / "cache", 0

    def counted(file: BinaryIO, name: str) -> Any:
        nonlocal read
        read += 1
        return hashlib.new(name, file.read())

    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setattr(weight_hashes, "LEAST_KEPT_NBYTES", 1)
    path.write_bytes(b"weights")
    expected = [hashlib.sha256(b"weights").hexdigest()]
    assert hash_files([path], cache) == hash_files([path], cache) == expected and read == 1
    (entry,) = cache.iterdir()
    for damaged in (b"", b"[]", b"{", b'{"file": 1, "sha256": "00"}'):
        entry.write_bytes(damaged)
        assert hash_files([path], cache) == expected
    assert read == 5
    monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=PermissionError))  # a cache that cannot be written
    entry.unlink()
    assert hash_files([path], cache) == hash_files([path], cache) == expected and read == 7


def test_a_blob_of_the_hub_that_has_changed_is_refused(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    repository = tmp_path / "models--acme--eyes"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    shutil.copytree(qwen3_vl_folder, snapshot)
    blobs.mkdir()
    weights = snapshot / "model.safetensors"
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    assert open_checkpoint(str(snapshot)).revision == open_checkpoint(str(qwen3_vl_folder)).revision
    changed_byte(blob, blob.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="download it again"):
        open_checkpoint(str(snapshot)).start_hashing()()


def test_dummies_need_no_weights_and_fit_no_real_ones(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    for folder in (bare, other):
        shutil.copytree(qwen3_vl_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (other / "config.json").write_text(json.dumps(open_checkpoint(str(bare)).config | {"changed": True}))
    revisions = [
        open_checkpoint(str(folder), load_format="dummy").revision for folder in (qwen3_vl_folder, bare, other)
    ]
    assert revisions[0] == revisions[1] != revisions[2]
    assert revisions[1] != open_checkpoint(str(bare)).revision


def test_what_is_missing_is_named(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    checkpoint = open_checkpoint(str(qwen3_vl_folder))
    with pytest.raises(CheckpointError, match=r"no\.such\.tensor"):
        list(checkpoint.read_tensors(["no.such.tensor"]))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type"):
        _ = open_checkpoint(str(tmp_path)).config
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(CheckpointError, match="safetensors"):
        open_checkpoint(str(tmp_path)).tensor_names()


def test_a_hub_id_is_found_in_the_hubs_cache(
    tmp_path: Path, qwen3_vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as the hub client lays it out after a download; the revision is the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--acme--eyes"
    shutil.copytree(qwen3_vl_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint("acme/eyes")
    assert (checkpoint.model, checkpoint.revision) == ("acme/eyes", commit)
    assert checkpoint.config["model_type"] == "qwen3_vl"
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    dummy = open_checkpoint("acme/eyes", load_format="dummy")
    assert (dummy.revision, dummy.config["model_type"]) == (f"dummy-{commit}", "qwen3_vl")
    with pytest.raises(CheckpointError, match="acme/ears"):
        open_checkpoint("acme/ears")
