"""Short videos of a ball that moves in one direction, sometimes past a shape that does not move."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from vitrine_vlm.sample_models.tiny_vlm.data import canvas, colors
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Clip, Question, sentence, with_article
from vitrine_vlm.sample_models.tiny_vlm.data.shapes import draw_shape

MAX_SIDE = 192
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_FPS = (6, 8, 10, 12, 15, 24, 25, 30)
_STANDING = ("square", "triangle", "star", "cross")

_ASK_DIRECTION = ("Which way does the ball move?", "In which direction does the ball move?", "Where does the ball go?")


@dataclass(frozen=True)
class Motion:
    direction: str
    color: str


def film_ball(rng: random.Random) -> tuple[Clip, Motion]:
    """Returns a clip of two to four seconds, and its motion."""
    size = canvas.size(rng, max_side=MAX_SIDE)
    ground = colors.background(rng)
    color, standing = colors.visible_colors(rng, ground, 2)
    direction = rng.choice(list(_STEPS))
    radius = min(size) * rng.uniform(0.1, 0.18)
    # The ball's center moves from `start` to `end` in a box that keeps the ball inside the picture.
    room = [side - 2 * radius for side in size]
    start, end = sorted((rng.uniform(0, 0.3), rng.uniform(0.7, 1.0)))
    across = rng.uniform(0, 1)
    step_x, step_y = _STEPS[direction]
    if step_x + step_y < 0:
        start, end = end, start
    ends = [((at, across) if step_x else (across, at)) for at in (start, end)]
    first, last = ([radius + each * space for each, space in zip(point, room, strict=True)] for point in ends)
    fps = rng.choice(_FPS)
    num_frames = round(fps * rng.uniform(2.0, 4.0))
    still = Image.new("RGB", size, ground)
    if rng.random() < 0.4:
        where = (size[0] * rng.uniform(0.2, 0.8), size[1] * rng.uniform(0.2, 0.8))
        draw_shape(still, rng.choice(_STANDING), where, min(size) * rng.uniform(0.1, 0.2), colors.shade(rng, standing))
    draw = functools.partial(
        _frame, still, (first[0], first[1]), (last[0], last[1]), radius, colors.shade(rng, color), num_frames
    )
    return Clip(num_frames, fps, size, draw), Motion(direction, color)


def _frame(
    still: Image.Image,
    first: tuple[float, float],
    last: tuple[float, float],
    radius: float,
    color: colors.Rgb,
    num_frames: int,
    index: int,
) -> Image.Image:
    image = still.copy()
    done = index / (num_frames - 1)
    center = (first[0] + done * (last[0] - first[0]), first[1] + done * (last[1] - first[1]))
    draw_shape(image, "circle", center, radius / 0.9, color)
    return image


def clip_questions(rng: random.Random, motion: Motion) -> Iterator[Question]:
    """Yields questions about one clip."""
    yield Question("video", rng.choice(_ASK_DIRECTION), motion.direction)
    yield Question("video", rng.choice(("What color is the ball?", "What is the color of the ball?")), motion.color)
    asked = (
        motion.direction if rng.random() < 0.5 else rng.choice([each for each in _STEPS if each != motion.direction])
    )
    yield Question("video", f"Does the ball move {asked}?", "yes" if asked == motion.direction else "no")
    description = sentence([f"{with_article(motion.color)} ball moves {motion.direction}"])
    yield Question("video", rng.choice(("What happens in this video?", "Describe the video.")), description)
