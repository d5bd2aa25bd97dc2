"""Held-out questions as a client would send them: encoded files and text."""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image

from vitrine_vlm.sample_models.reference import Media
from vitrine_vlm.sample_models.tiny_vlm.data.generator import draw_question
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Clip, Kind

_VIDEO_BITS_PER_S = 4_000_000


@dataclass(frozen=True)
class AskedQuestion:
    """A question: `media` are its files in order, `text` is the question, `answer` the only right answer."""

    kind: Kind
    media: tuple[Media, ...]
    text: str
    answer: str


def held_out_questions(count: int) -> list[AskedQuestion]:
    """Returns the first `count` questions of the held-out split; the kinds of question alternate."""
    asked = []
    for index in range(count):
        sample, question = draw_question("heldout", index)
        media = tuple(_png(each) if isinstance(each, Image.Image) else _mp4(each) for each in sample.media)
        asked.append(AskedQuestion(question.kind, media, question.text, question.answer))
    return asked


def _png(image: Image.Image) -> Media:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Media("image", file.getvalue())


def _mp4(clip: Clip) -> Media:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=clip.fps)
        # Subsampled colour needs even sides: the last row or column may be cut.
        stream.width, stream.height = (side // 2 * 2 for side in clip.size)
        stream.pix_fmt, stream.bit_rate = "yuv420p", _VIDEO_BITS_PER_S
        for index in range(clip.num_frames):
            frame = clip.frame(index).crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame))))
        container.mux(stream.encode())
    return Media("video", file.getvalue())
