"""What clients ask for: an object that a small model cannot write at great length."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """A shape in a picture."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["circle", "square", "triangle"]
    color: Literal["red", "green", "blue"]
    is_filled: bool
