"""Coloured shapes in the cells of a grid, and questions about them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vitrine_vlm.sample_models.tiny_vlm.data import canvas, colors
from vitrine_vlm.sample_models.tiny_vlm.data.sample import Question, sentence, with_article

NAMES = ("circle", "square", "triangle", "star", "diamond", "cross")
MAX_SHAPES = 6
_MIN_CELL = 30
# Rows and columns of the cells; shapes are in their centers.
_GRIDS = ((1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (2, 2), (2, 3), (3, 2), (3, 3), (3, 3), (3, 3))
_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "", "bottom")}
_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "", "right")}


def _star_corner(index: int) -> tuple[float, float]:
    reach = 1.0 if index % 2 == 0 else 0.4
    return reach * math.sin(math.pi * index / 5), -reach * math.cos(math.pi * index / 5)


_HALF, _ARM = math.sqrt(0.5), 0.3
# Corners of the polygons around the origin, y down, inside the unit circle.
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-_HALF, -_HALF), (_HALF, -_HALF), (_HALF, _HALF), (-_HALF, _HALF)],
    "triangle": [(0, -0.95), (0.9, 0.7), (-0.9, 0.7)],
    "star": [_star_corner(index) for index in range(10)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "cross": [
        (-_ARM, -0.92), (_ARM, -0.92), (_ARM, -_ARM), (0.92, -_ARM), (0.92, _ARM), (_ARM, _ARM),
        (_ARM, 0.92), (-_ARM, 0.92), (-_ARM, _ARM), (-0.92, _ARM), (-0.92, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip

_ASK_COLOR = ("What color is the {}?", "Which color does the {} have?", "What is the color of the {}?")
_ASK_SHAPE = ("What shape is {}?", "Which shape is {}?", "What is the shape of the {} object?")
_ASK_POSITION = ("Where is the {}?", "Where in the picture is the {}?", "In which part of the picture is the {}?")
_ASK_COUNT = ("How many shapes are there?", "How many shapes are in the picture?", "How many shapes do you see?")


@dataclass(frozen=True)
class Shape:
    """A shape. `name` and `color` as in questions; `row` and `column` of its cell; `place`, such as "top left"."""

    name: str
    color: str
    row: int
    column: int
    place: str

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.name}"


def draw_shapes(rng: random.Random, max_side: int = canvas.MAX_SIDE) -> tuple[Image.Image, tuple[Shape, ...]]:
    """Returns a picture and its shapes in reading order."""
    width, height = canvas.size(rng, max_side=max_side)
    rows, columns = rng.choice(
        [grid for grid in _GRIDS if height >= _MIN_CELL * grid[0] and width >= _MIN_CELL * grid[1]]
    )
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    cells = sorted(rng.sample(cells, rng.randint(1, min(MAX_SHAPES, len(cells)))))
    ground = colors.background(rng)
    shapes = tuple(
        Shape(rng.choice(NAMES), color, row, column, _place(_ROWS[rows][row], _COLUMNS[columns][column]))
        for (row, column), color in zip(cells, colors.visible_colors(rng, ground, len(cells)), strict=True)
    )
    image = canvas.blank(rng, (width, height), ground)
    cell_width, cell_height = width / columns, height / rows
    for shape in shapes:
        radius = min(cell_width, cell_height) / 2 * rng.uniform(0.6, 0.95)
        play_x, play_y = max(0.0, 0.2 * cell_width - 0.2 * radius), max(0.0, 0.2 * cell_height - 0.2 * radius)
        x = (shape.column + 0.5) * cell_width + rng.uniform(-play_x, play_x)
        y = (shape.row + 0.5) * cell_height + rng.uniform(-play_y, play_y)
        draw_shape(
            image, shape.name, (x, y), radius, colors.shade(rng, shape.color), math.radians(rng.uniform(-12, 12))
        )
    return canvas.worn(rng, image), shapes


def draw_shape(
    image: Image.Image, name: str, center: tuple[float, float], radius: float, color: colors.Rgb, turn: float = 0.0
) -> None:
    """Draws one shape with smooth edges onto `image`; `turn` is in radians."""
    scale = 4 if radius < 40 else 2
    side = math.ceil(2 * radius) + 2
    left, top = math.floor(center[0] - radius) - 1, math.floor(center[1] - radius) - 1
    mask = Image.new("L", (side * scale, side * scale))
    x, y, reach = (center[0] - left) * scale, (center[1] - top) * scale, radius * scale
    if name == "circle":
        reach *= 0.9
        ImageDraw.Draw(mask).ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
    else:
        cos, sin = math.cos(turn) * reach, math.sin(turn) * reach
        ImageDraw.Draw(mask).polygon(
            [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in _CORNERS[name]], fill=255
        )
    image.paste(color, (left, top), mask.reduce(scale))


def shape_questions(rng: random.Random, shapes: tuple[Shape, ...]) -> Iterator[Question]:
    """Yields questions about one picture of shapes."""
    names = Counter(shape.name for shape in shapes)
    palette = Counter(shape.color for shape in shapes)
    phrases = Counter(shape.phrase for shape in shapes)
    for shape in shapes:
        if names[shape.name] == 1:
            yield Question("color", rng.choice(_ASK_COLOR).format(shape.name), shape.color)
        if palette[shape.color] == 1:
            yield Question("shape", rng.choice(_ASK_SHAPE).format(shape.color), shape.name)
        if phrases[shape.phrase] == 1:
            yield Question("position", rng.choice(_ASK_POSITION).format(shape.phrase), shape.place)
        at = "in the center" if shape.place == "center" else f"at the {shape.place}"
        yield Question("shape", f"Which shape is {at}?", shape.name)
        yield Question("color", f"What color is the shape {at}?", shape.color)
    yield Question("count", rng.choice(_ASK_COUNT), str(len(shapes)))
    name = rng.choice((rng.choice(NAMES), shapes[0].name))
    plural = f"{name}{'es' if name == 'cross' else 's'}"
    yield Question(
        "count", rng.choice(("How many {} are there?", "How many {} do you see?")).format(plural), str(names[name])
    )
    color = rng.choice((rng.choice(list(colors.COLORS)), shapes[-1].color))
    yield Question("count", f"How many shapes are {color}?", str(palette[color]))
    unique = [shape for shape in shapes if phrases[shape.phrase] == 1]
    if len(unique) >= 2:
        yield _relation(rng, *rng.sample(unique, 2))
    yield _existence(rng, shapes)
    yield Question("description", "What shapes and colors are in this picture?", describe_shapes(shapes))


def describe_shapes(shapes: tuple[Shape, ...]) -> str:
    """Returns all shapes in reading order, such as: A red circle, a blue square and a green star."""
    return sentence([with_article(shape.phrase) for shape in shapes])


def _relation(rng: random.Random, one: Shape, other: Shape) -> Question:
    sides = []
    if one.column != other.column:
        sides += [("left of", one.column < other.column), ("right of", one.column > other.column)]
    if one.row != other.row:
        sides += [("above", one.row < other.row), ("below", one.row > other.row)]
    side, holds = rng.choice(sides)
    return Question("relation", f"Is the {one.phrase} {side} the {other.phrase}?", "yes" if holds else "no")


def _existence(rng: random.Random, shapes: tuple[Shape, ...]) -> Question:
    """Returns a yes-or-no question, evenly drawn; for "no" it combines the name and colour of two shapes, if it can."""
    phrases = {shape.phrase for shape in shapes}
    absent = [f"{a.color} {b.name}" for a in shapes for b in shapes if f"{a.color} {b.name}" not in phrases]
    absent = absent or [
        f"{color} {shapes[0].name}" for color in colors.COLORS if f"{color} {shapes[0].name}" not in phrases
    ]
    phrase = rng.choice(sorted(phrases) if rng.random() < 0.5 else absent)
    text = rng.choice(("Is there {}?", "Do you see {}?")).format(with_article(phrase))
    return Question("relation", text, "yes" if phrase in phrases else "no")


def _place(row: str, column: str) -> str:
    return " ".join(part for part in (row, column) if part) or "center"
