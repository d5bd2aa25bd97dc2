"""What the launcher sends as the picture."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from vitrine_vlm.deploy.launcher.picture import picture_url


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2])))


def test_drawn_picture_shows_what_it_says() -> None:
    url = picture_url(None)
    assert url.startswith("data:image/png;base64,")
    picture = opened(url)
    assert picture.size == (448, 320)
    assert picture.getpixel((104, 120)) == (255, 0, 0)
    assert picture.getpixel((276, 116)) == (0, 0, 255)


def test_file_is_sent_as_it_is(tmp_path: Path) -> None:
    # The type comes from the content: the name lies.
    path = tmp_path / "photo.png"
    Image.new("RGB", (5, 4), "green").save(path, "JPEG")
    url = picture_url(str(path))
    assert url.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(url.partition(";base64,")[2]) == path.read_bytes()


def test_address_is_passed_on() -> None:
    assert picture_url("https://example.com/a.png") == "https://example.com/a.png"


def test_unusable_files_are_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for path in (text, tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=path.name):
            picture_url(str(path))
