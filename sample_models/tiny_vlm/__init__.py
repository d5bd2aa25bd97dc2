"""The small model that ships with the project: its training data and its training."""

from __future__ import annotations

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "vitrine-tiny-vlm"
