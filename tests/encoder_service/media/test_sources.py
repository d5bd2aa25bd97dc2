"""file: URLs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitrine_vlm.encoder_service.media.sources import read_file_url
from vitrine_vlm.errors import MediaNotAllowed, MediaNotFound, MediaTooLarge

BYTES = bytes(range(256))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    (allowed / "sub dir").mkdir(parents=True)
    (allowed / "sub dir" / "é.png").write_bytes(BYTES)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return allowed


def test_file_below_the_folder(folder: Path) -> None:
    url = (folder / "sub dir" / "é.png").as_uri()
    assert "%20" in url
    assert read_file_url(url, folder, 256) == BYTES
    assert read_file_url(url.replace("file://", "file://localhost"), folder, 256) == BYTES
    link = folder.parent / "link to the folder"
    link.symlink_to(folder)
    assert read_file_url(url, link, 256) == BYTES
    with pytest.raises(MediaTooLarge, match="256 bytes: at most 255"):
        read_file_url(url, folder, 255)
    with pytest.raises(MediaNotAllowed, match="not accepted"):
        read_file_url(url, None, 256)


def test_nothing_outside_the_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    (folder.parent / "allowed too").mkdir()
    (folder.parent / "allowed too" / "x.png").write_bytes(b"x")
    for path in (
        "link.png",
        "up/secret.png",
        "../secret.png",
        "%2e%2e/secret.png",
        "../allowed too/x.png",
        "../nothing",
    ):
        with pytest.raises(MediaNotAllowed, match="outside"):
            read_file_url(f"file://{folder}/{path}", folder, 256)
    with pytest.raises(MediaNotAllowed, match="outside"):
        read_file_url("file:///etc/passwd", folder, 10**6)


@pytest.mark.parametrize("url", ["file://host/x", "file:x.png", "file:///a%00b", "file://[/x", "file:///\ud800%41"])
def test_malformed_file_urls(folder: Path, url: str) -> None:
    with pytest.raises(MediaNotAllowed):
        read_file_url(url, folder, 256)


def test_only_regular_files_that_exist(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for name in ("pipe", "sub dir"):
        with pytest.raises(MediaNotAllowed):
            read_file_url((folder / name).as_uri(), folder, 256)
    with pytest.raises(MediaNotFound, match="no file"):
        read_file_url((folder / "none.png").as_uri(), folder, 256)
