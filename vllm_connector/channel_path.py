"""Where the socket of the worker channel lies: in a folder that only this user can enter, named after the engine."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "vitrine-vllm-"
_SOCKET = "workers.sock"


def socket_path(engine: str) -> Path:
    """Returns the path of the socket of this engine, which no other engine of the host has."""
    name = hashlib.sha256(engine.encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getuid()}-{name}" / _SOCKET


def make_private_folder(path: Path) -> None:
    """Makes the socket's folder, and removes those of engines that were killed.

    Raises:
        OSError: it cannot be made.
        PermissionError: it exists and belongs to another user, or others can enter it.
    """
    _remove_stale_folders(path.parent.parent)
    folder = path.parent
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_private(path)
    path.unlink(missing_ok=True)


def check_private(path: Path) -> None:
    """
    Raises:
        PermissionError: the socket's folder belongs to another user, or others can enter it.
    """
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{path.parent} is not a folder that only this user can enter: remove it")


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent, ignore_errors=True)


def _remove_stale_folders(temporary: Path) -> None:
    """Removes folders of this user whose socket does not answer: their engine has been killed."""
    for folder in temporary.glob(f"{_PREFIX}{os.getuid()}-*"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.2)
            try:
                probe.connect(str(folder / _SOCKET))
            except ConnectionRefusedError:
                shutil.rmtree(folder, ignore_errors=True)
