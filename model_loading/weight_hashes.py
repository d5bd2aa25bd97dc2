"""SHA-256 of the weights files of a checkpoint, over all of their bytes.

Hashes of large files are kept in the user's cache, by path, size, inode and times of the file; where that cannot be
written, every start hashes again. A start that reads the weights meanwhile does not wait for it, see
`Checkpoint.start_hashing`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

# To hash less takes no time.
LEAST_KEPT_NBYTES = 64 * 1024**2
_THREADS = 4
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")


class ChangedFile(ValueError):
    """A file of the hub's cache is not what was downloaded."""


def hash_files(paths: list[Path], cache_folder: Path | None = None) -> list[str]:
    """Returns the SHA-256 of each file, in hexadecimal digits. Blocks; several files are read at once.

    Args:
        cache_folder: where hashes are kept; None: beside the hub's cache.

    Raises:
        OSError: a file cannot be read.
        ChangedFile: the hub's cache names a file by its hash, and that is another one.
    """
    cache_folder = cache_folder or Path(constants.HF_HOME) / "vitrine" / "hashes"
    # hashlib works outside of the interpreter's lock.
    with ThreadPoolExecutor(_THREADS, "hashing") as threads:
        return list(threads.map(lambda path: _hash_file(path, cache_folder), paths))


def _hash_file(path: Path, cache_folder: Path) -> str:
    real = path.resolve()
    entry = cache_folder / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    with real.open("rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        digest = _read_entry(entry, identity)
        if digest is None:
            is_large = os.fstat(file.fileno()).st_size >= LEAST_KEPT_NBYTES
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            # A file that was written meanwhile has another hash by now.
            if is_large and _identity(os.fstat(file.fileno())) == identity:
                _write_entry(entry, identity, digest)
    if path.is_symlink() and real.parent.name == "blobs" and _LFS_BLOB.fullmatch(real.name) and real.name != digest:
        raise ChangedFile(f"{path} has the SHA-256 {digest}, and was downloaded as {real.name}: download it again")
    return digest


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _read_entry(entry: Path, identity: list[int]) -> str | None:
    with suppress(OSError, ValueError):
        kept = json.loads(entry.read_bytes())
        if isinstance(kept, dict) and kept.get("file") == identity and _LFS_BLOB.fullmatch(str(kept.get("sha256"))):
            return str(kept["sha256"])
    return None


def _write_entry(entry: Path, identity: list[int], digest: str) -> None:
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=entry.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"file": identity, "sha256": digest}, file)
        os.replace(name, entry)
