"""Reads a Hugging Face checkpoint: a local folder or a hub id, one named part of its tensors at a time.

Both services are built from the same checkpoint, so they share how it is found, identified and read. Each service
chooses its own tensors and does not read the other's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

LoadFormat = Literal["auto", "dummy"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLE_NBYTES = 64 * 1024
_SAMPLES_PER_FILE = 16
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
    revision: the hub commit or a content fingerprint, with a prefix for dummy weights, which match no real ones.
    load_format: with "dummy" no weights are read, and none need exist.
    """

    folder: Path
    model: str
    revision: str
    load_format: LoadFormat = "auto"

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
        return Checkpoint(folder, name, _revision(_fingerprint(folder, load_format), load_format), load_format)
    if folder.exists() or model.startswith((".", "/")):
        raise CheckpointError(f"{model} has no config.json: give a checkpoint folder or a hub id")
    try:
        files = [*_OTHER_FILES] if load_format == "dummy" else [*_OTHER_FILES, _WEIGHTS]
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client's errors have no common base
        raise CheckpointError(f"could not get {model!r} from the hub: {error}") from error
    # The hub cache lays snapshots out as .../snapshots/<commit>/.
    return Checkpoint(snapshot, served_model_name or model, _revision(snapshot.name, load_format), load_format)


def _revision(content: str, load_format: LoadFormat) -> str:
    return f"dummy-{content}" if load_format == "dummy" else content


def _fingerprint(folder: Path, load_format: LoadFormat) -> str:
    """Returns the SHA-256 of config.json and of each weights file's name, size and evenly spread samples."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in [] if load_format == "dummy" else sorted(folder.glob(_WEIGHTS)):
        nbytes = path.stat().st_size
        digest.update(f"{path.name}:{nbytes}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES_PER_FILE):
                file.seek(max(0, nbytes - _SAMPLE_NBYTES) * sample // (_SAMPLES_PER_FILE - 1))
                digest.update(file.read(_SAMPLE_NBYTES))
    return digest.hexdigest()
