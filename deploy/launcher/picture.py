"""The picture of the launcher's question: a given one, or one that is drawn."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw

DRAWN_PICTURE = "a red circle, a blue square and a green triangle on white"


def picture_url(image: str | None) -> str:
    """Returns the picture as a URL for an OpenAI client.

    Args:
        image: an http(s) address, which is returned unchanged; a file, which becomes a data: URL; None to draw one.

    Raises:
        ValueError: the file is missing or Pillow cannot open it.
    """
    if image is None:
        return _data_url(_draw(), "image/png")
    if image.startswith(("http://", "https://", "data:")):
        return image
    try:
        data = Path(image).expanduser().read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            mime_type = opened.get_format_mimetype() or "application/octet-stream"
    except OSError as error:  # Pillow's UnidentifiedImageError is one, too
        raise ValueError(f"IMAGE {image} cannot be used: {error}") from error
    return _data_url(data, mime_type)


def _draw() -> bytes:
    picture = Image.new("RGB", (448, 320), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((24, 40, 184, 200), fill="red")
    draw.rectangle((216, 56, 336, 176), fill="blue")
    draw.polygon([(300, 290), (360, 200), (420, 290)], fill="green")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _data_url(data: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"
