"""Media in files. These functions block; the loader runs them in threads."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from vitrine_vlm.errors import MediaNotAllowed, MediaNotFound, MediaTooLarge


def read_file_url(url: str, allowed_folder: Path | None, max_bytes: int) -> bytes:
    """The file that a file: URL names, which must lie below `allowed_folder` after every symbolic link is followed.

    Raises:
        MediaNotAllowed: files are not accepted, or this one lies elsewhere or is no regular file.
        MediaNotFound: no such file.
        MediaTooLarge: more than `max_bytes` bytes.
    """
    if allowed_folder is None:
        raise MediaNotAllowed("file: URLs are not accepted by this encoder: send the file itself or an https: URL")
    try:
        parts = urlsplit(url)
        path = os.fsdecode(unquote_to_bytes(parts.path))
    except ValueError as error:
        raise MediaNotAllowed("a file: URL must be file:///absolute/path") from error
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise MediaNotAllowed("a file: URL must be file:///absolute/path")
    folder = os.path.realpath(allowed_folder)
    # Containment is checked before existence, so that a client cannot probe for files elsewhere.
    real = os.path.realpath(path)
    if os.path.commonpath([folder, real]) != folder:
        raise MediaNotAllowed(f"file {path[-80:]!r} is outside the folder that file: URLs may name")
    try:
        # NOFOLLOW: a link put there since realpath is refused; NONBLOCK: a pipe does not block the thread.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MediaNotFound(f"no file {path[-80:]!r}: check the path") from error
    except OSError as error:
        raise MediaNotAllowed(f"file {path[-80:]!r} could not be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaNotAllowed(f"{path[-80:]!r} is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            # One byte more than allowed shows that the file grew since.
            data = b"" if status.st_size > max_bytes else file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if status.st_size > max_bytes or len(data) > max_bytes:
        raise MediaTooLarge(f"file {path[-80:]!r} holds {status.st_size} bytes: at most {max_bytes} are accepted")
    return data
