"""The model used when none is given: a small random checkpoint, made once and kept in .cache/."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

_CACHE_FOLDER = Path(".cache")
_RECIPE = ("checkpoint.py", "byte_tokenizer.py")


def default_model() -> Path:
    """The checkpoint's folder, made on the first call in seconds and again whenever its recipe has changed."""
    recipe = b"".join((Path(__file__).parents[1] / "random_checkpoint" / name).read_bytes() for name in _RECIPE)
    folder = _CACHE_FOLDER / f"random-qwen3-vl-{hashlib.sha256(recipe).hexdigest()[:8]}"
    if folder.exists():
        return folder
    # Importing transformers' models takes seconds: only where they are needed.
    from transformers.utils import logging

    from deploy.random_checkpoint import save_random_checkpoint

    logging.disable_progress_bar()
    _CACHE_FOLDER.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=_CACHE_FOLDER, prefix="unfinished-"))
    try:
        save_random_checkpoint(unfinished, "qwen3_vl")
        os.rename(unfinished, folder)
    except OSError:
        if not folder.exists():  # else another launcher was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
