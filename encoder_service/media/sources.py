"""Media that needs no network: data: URLs and files. These functions block; the loader runs them in threads."""

from __future__ import annotations

import binascii
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from vitrine_vlm.errors import MediaError, MediaNotAllowed, MediaNotFound, MediaTooLarge

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes in a data: URL (RFC 2397), base64 or percent-encoded. Nothing is repaired or skipped.

    Raises:
        MediaError: the URL is malformed.
        MediaTooLarge: more than `max_bytes` bytes.
    """
    header, comma, payload = url[len("data:") :].partition(",")
    if not comma:
        raise MediaError(f"a data: URL of {len(url)} characters has no comma: expected data:<type>;base64,<data>")
    if _BAD_ESCAPE.search(payload):
        raise MediaError(f"a data: URL of {len(url)} characters has a % without two hexadecimal digits behind it")
    is_base64 = header.lower().endswith(";base64")
    # Before anything is copied: at least 3/4 (base64), or 1/3 (all escapes), of the characters become bytes.
    if len(payload) * (0.75 if is_base64 and "%" not in payload else 1 / 3) > max_bytes + 2:
        raise MediaTooLarge(f"a data: URL of {len(url)} characters: at most {max_bytes} bytes are accepted")
    try:
        data = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        if is_base64:
            data = binascii.a2b_base64(data, strict_mode=True)
    except UnicodeEncodeError as error:
        raise MediaError(f"a data: URL of {len(url)} characters is not plain ASCII: escape it or use base64") from error
    except binascii.Error as error:
        raise MediaError(f"a data: URL of {len(url)} characters is not valid base64: {error}") from error
    if len(data) > max_bytes:
        raise MediaTooLarge(f"a data: URL of {len(data)} bytes: at most {max_bytes} are accepted")
    return data


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
