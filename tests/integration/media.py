"""Pictures and clips for tests, encoded as a client would send them."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image

from vitrine_vlm.sample_models.reference import Media


def picture(seed: int, width: int, height: int) -> Media:
    """A PNG of smooth random colours, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return Media("image", file.getvalue())


def clip(seed: int, width: int, height: int, num_frames: int, fps: int = 8) -> Media:
    """An MP4 of smooth random colours that change from frame to frame."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(num_frames):
            coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return Media("video", file.getvalue())
