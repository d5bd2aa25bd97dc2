"""Reads a Hugging Face checkpoint: a local folder or a hub id, one named part of its tensors at a time.

Both services are built from the same checkpoint, so they share how it is found, identified and read. Each service
chooses its own tensors and does not read the other's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from vitrine_vlm.model_loading.weight_hashes import ChangedFile, hash_files

LoadFormat = Literal["auto", "dummy"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHTS = "*.safetensors"
_OTHER_FILES = ("*.json", "*.txt", "*.jinja")


class CheckpointError(ValueError):
    """The folder or hub id is not a usable checkpoint."""


@dataclass(frozen=True)
class TensorPart:
    """Ranges of a tensor along one dim, which are read and concatenated."""

    dim: int
    ranges: tuple[slice, ...]


# Maps a tensor's name and shape to the part to read; None reads the whole tensor.
ChoosePart: TypeAlias = Callable[[str, tuple[int, ...]], TensorPart | None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on local disk.

    model: the hub id or folder name by which it was requested.
    commit: of the hub; empty for a folder.
    load_format: with "dummy" no weights are read, and none need exist.
    """

    folder: Path
    model: str
    commit: str
    load_format: LoadFormat = "auto"

    @functools.cached_property
    def revision(self) -> str:
        """The hub commit, or of a folder a SHA-256 over its config and all bytes of its weights, wherever it lies.

        Dummy weights, which match no real ones, are no part of it, and make a prefix. Blocks while files are hashed.

        Raises:
            CheckpointError: a file cannot be read, or is not what was downloaded from the hub.
        """
        paths = [] if self.load_format == "dummy" else sorted(self.folder.glob(_WEIGHTS))
        try:
            hashes = hash_files(paths)
            content = self.commit or _fingerprint(self.folder, paths, hashes)
        except (OSError, ChangedFile) as error:
            raise CheckpointError(f"the weights of {self.model} cannot be identified: {error}") from error
        return f"dummy-{content}" if self.load_format == "dummy" else content

    def start_hashing(self) -> Callable[[], str]:
        """Begins to hash on a thread of its own; returns a function that waits for `revision` and returns it."""
        result: Future[str] = Future()

        def run() -> None:
            try:
                result.set_result(self.revision)
            except BaseException as error:
                result.set_exception(error)

        # A daemon, as a start that fails does not wait for it.
        threading.Thread(target=run, name="hashing", daemon=True).start()
        return result.result

    def json(self, name: str) -> dict[str, Any]:
        """Returns the content of a JSON file of the checkpoint; empty if the file is missing."""
        path = self.folder / name
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds {type(content).__name__}, expected a JSON object")
        return content

    @property
    def config(self) -> dict[str, Any]:
        config = self.json("config.json")
        if "model_type" not in config:
            raise CheckpointError(f"{self.folder / 'config.json'} is missing or names no model_type")
        return config

    def tensor_names(self) -> dict[str, Path]:
        """Returns every tensor's name with the safetensors file that holds it."""
        if (self.folder / _INDEX).is_file():
            weight_map = self.json(_INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{self.folder / _INDEX} has no weight_map from tensor names to file names")
            for file in weight_map.values():
                # The index is not trusted: it must not point outside the folder.
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise CheckpointError(f"{_INDEX} names {file!r}, which is not the plain name of a safetensors file")
            return {name: self.folder / file for name, file in weight_map.items()}
        path = self.folder / _SINGLE
        if not path.is_file():
            raise CheckpointError(f"no {_SINGLE} and no {_INDEX} in {self.folder}: only safetensors weights are read")
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)

    def read_tensors(
        self,
        names: list[str],
        device: str | torch.device = "cpu",
        choose_part: ChoosePart = lambda name, shape: None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the named tensors, or the chosen parts, in the stored dtype, file by file; reads nothing else.

        Raises:
            CheckpointError: a name is not in the checkpoint, or a file of it is not there or not whole.
        """
        files = self.tensor_names()
        missing = [name for name in names if name not in files]
        if missing:
            raise CheckpointError(f"{len(missing)} tensors missing in {self.folder}, first: {missing[:3]}")
        for path in sorted({files[name] for name in names}):
            with _opened(path, str(device)) as file:
                for name in names:
                    if files[name] == path:
                        stored = file.get_slice(name)
                        part = choose_part(name, tuple(stored.get_shape()))
                        yield name, file.get_tensor(name) if part is None else _read_part(stored, part)


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file, open for reading.

    Raises:
        CheckpointError: it is not there, not whole, or does not hold what is read of it.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; get the checkpoint again") from error


def _read_part(stored: Any, part: TensorPart) -> torch.Tensor:
    before = (slice(None),) * part.dim
    return torch.cat([stored[(*before, each)] for each in part.ranges], part.dim)


def open_checkpoint(
    model: str,
    revision: str | None = None,
    served_model_name: str | None = None,
    load_format: LoadFormat = "auto",
) -> Checkpoint:
    """Opens `model` on local disk or downloads it from the hub.

    Args:
        model: a folder with config.json, or a hub id such as "organization/name".
        revision: hub branch, tag or commit; not used for folders.
        served_model_name: the name to serve, instead of the hub id or folder name.
        load_format: with "dummy" weights are neither downloaded nor part of a folder's revision.

    Raises:
        CheckpointError: neither a checkpoint folder nor a downloadable hub id.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        name = served_model_name or folder.resolve().name
        return Checkpoint(folder, name, "", load_format)
    if folder.exists() or model.startswith((".", "/")):
        raise CheckpointError(f"{model} has no config.json: give a checkpoint folder or a hub id")
    try:
        files = [*_OTHER_FILES] if load_format == "dummy" else [*_OTHER_FILES, _WEIGHTS]
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client's errors have no common base
        raise CheckpointError(f"could not get {model!r} from the hub: {error}") from error
    # The hub cache lays snapshots out as .../snapshots/<commit>/.
    return Checkpoint(snapshot, served_model_name or model, snapshot.name, load_format)


def _fingerprint(folder: Path, paths: list[Path], hashes: list[str]) -> str:
    """Returns the SHA-256 of config.json and of each weights file's name and hash."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path, file_hash in zip(paths, hashes, strict=True):
        digest.update(f"{path.name}:{file_hash}\n".encode())
    return digest.hexdigest()
