"""Short words to print. Held-out ones never occur in training, whose made-up words make the model read letters."""

from __future__ import annotations

import random
from pathlib import Path

from vitrine_vlm.sample_models.tiny_vlm.data.sample import Split

_TRAIN = (Path(__file__).parent / "words_train.txt").read_text(encoding="utf-8").split()
_HELD_OUT = (Path(__file__).parent / "words_heldout.txt").read_text(encoding="utf-8").split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MIN_LENGTH, _MAX_LENGTH = 3, 8
# Letters whose two cases look alike: alone they do not show the case of a word.
_CASELESS = frozenset("cosuvwxz")


def word(rng: random.Random, split: Split, max_length: int) -> str:
    """Returns a word of 3 to `max_length` letters, at most 8, in lower case, upper case or with a capital."""
    max_length = min(max_length, _MAX_LENGTH)
    if split == "train" and rng.random() < 0.7:
        text = _made_up(rng)[:max_length]
    else:
        words = _TRAIN if split == "train" or rng.random() < 0.5 else _HELD_OUT
        text = rng.choice([each for each in words if len(each) <= max_length])
    if _CASELESS.issuperset(text) or (split == "train" and text in _HELD_OUT):
        return word(rng, split, max_length)
    return rng.choice((str.lower, str.lower, str.upper, str.capitalize))(text)


def _made_up(rng: random.Random) -> str:
    """Returns random letters, or the beginning of a word and the end of another, sometimes with a letter changed."""
    if rng.random() < 0.4:
        return "".join(rng.choices(_LETTERS, k=rng.randint(_MIN_LENGTH, _MAX_LENGTH)))
    beginning, end = rng.choice(_TRAIN), rng.choice(_TRAIN)
    letters = list(beginning[: rng.randint(2, len(beginning))] + end[rng.randint(0, len(end) - 1) :])
    if rng.random() < 0.5:
        letters[rng.randrange(len(letters))] = rng.choice(_LETTERS)
    return "".join(letters)
