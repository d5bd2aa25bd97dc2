"""data: and file: URLs."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest

from vitrine_vlm.encoder_service.media.sources import decode_data_url, read_file_url
from vitrine_vlm.errors import MediaError, MediaNotAllowed, MediaNotFound, MediaTooLarge

BYTES = bytes(range(256))
BASE64 = base64.b64encode(BYTES).decode()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"data:image/png;base64,{BASE64}", BYTES),
        (f"DATA:;BASE64,{BASE64}", BYTES),
        (f"data:image/png;charset=x;base64,{BASE64.replace('+', '%2B')}", BYTES),
        (f"data:image/png,{quote_from_bytes(BYTES)}", BYTES),
        ("data:,plain", b"plain"),
        ("data:image/png;base64,", b""),
    ],
)
def test_data_urls(url: str, expected: bytes) -> None:
    assert decode_data_url(url, 256) == expected


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64", "data:;base64,AAA", "data:;base64,AA==AA", "data:;base64,A A=", "data:;base64,-_==",
     "data:;base64,AAAA\n", "data:,%4", "data:,%zz", "data:,\u00e9", "data:;base64,\u00e9\u00e9==", "data:,%41\ud800"],
)  # fmt: skip
def test_malformed_data_urls(url: str) -> None:
    with pytest.raises(MediaError) as caught:
        decode_data_url(url, 256)
    assert type(caught.value) is MediaError


@pytest.mark.parametrize("url", [f"data:;base64,{BASE64}", f"data:,{quote_from_bytes(BYTES)}", "data:," + "a" * 256])
def test_large_data_urls_are_refused_without_their_content(url: str) -> None:
    with pytest.raises(MediaTooLarge) as caught:
        decode_data_url(url, 255)
    assert len(str(caught.value)) < 120


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
