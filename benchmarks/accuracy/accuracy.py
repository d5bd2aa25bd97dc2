"""Counts right answers by kind of question, and prints them as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accuracy.questions import AskedQuestion
from vitrine_vlm.sample_models.tiny_vlm.data.generator import KINDS


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, 0 to 1: of all questions, and of each kind that has questions."""

    overall: float
    by_kind: dict[str, float]


def accuracy(questions: Sequence[AskedQuestion], answers: Sequence[str]) -> Accuracy:
    """Returns the accuracy; an answer is right if it equals the expected one, letter for letter."""
    asked = Counter(question.kind for question in questions)
    pairs = zip(questions, answers, strict=True)
    right = Counter(question.kind for question, answer in pairs if answer.strip() == question.answer)
    return Accuracy(right.total() / len(questions), {kind: right[kind] / asked[kind] for kind in KINDS if asked[kind]})


def table_header() -> str:
    names = ["answered by", "all", *KINDS, "same as transformers", "s"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def table_row(name: str, measured: Accuracy, same: float | None, seconds: float) -> str:
    """Returns a line of a Markdown table; `same` is the share of answers that equal those of transformers."""
    shares = [measured.overall, *(measured.by_kind.get(kind) for kind in KINDS), same]
    shown = ["-" if share is None else f"{share:.1%}" for share in shares]
    return f"| {' | '.join([name, *shown, f'{seconds:.0f}'])} |"
