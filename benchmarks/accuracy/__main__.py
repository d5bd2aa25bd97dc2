"""Answers held-out questions through the whole split and prints accuracy by kind: `make eval`.

All ways of answering must reach the same accuracy, those in FP8 nearly, except for the last: without deepstack rows it
must be worse.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.accuracy.ablation import without_deepstack
from benchmarks.accuracy.accuracy import accuracy, table_header, table_row
from benchmarks.accuracy.answering import answers_of_split, answers_of_transformers
from benchmarks.accuracy.questions import AskedQuestion, held_out_questions
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

Answer = Callable[[Path, Sequence[AskedQuestion]], list[str]]
ABLATION = "shm, deepstack rows zeroed"
FP8 = "shm, decoder in FP8"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    questions = held_out_questions(options.questions)
    print(table_header(), flush=True)
    expected: list[str] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for name, answer in ways().items():
            if options.only and name not in options.only:
                continue
            folder = without_deepstack(options.model, Path(scratch) / "model") if name == ABLATION else options.model
            start = time.perf_counter()
            # The services' log lines must not interrupt the table.
            with contextlib.redirect_stdout(sys.stderr):
                answers = answer(folder, questions)
            seconds = time.perf_counter() - start
            if name == "transformers":
                expected = answers
            same = sum(map(str.__eq__, answers, expected)) / len(answers) if expected is not None else None
            print(table_row(name, accuracy(questions, answers), same, seconds), flush=True)
            if options.show_wrong:
                _print_wrong(questions, answers)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="checkpoint folder; default: the shipped one")
    parser.add_argument("--questions", type=int, default=500, help="how many; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(ways()), help="some of the ways to answer")
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer, too")
    return parser


def ways() -> dict[str, Answer]:
    """Returns all ways of answering that this machine supports, by name."""
    no_embedding_cache = ("--cache-gpu-bytes", "0", "--cache-host-bytes", "0")
    small_chunks = ("--max-num-batched-tokens", "40")
    found = {
        "transformers": answers_of_transformers,
        "shm": _split("shm"),
        "grpc": _split("grpc"),
        "shm, chunks of 40 tokens": _split("shm", *small_chunks),
        "grpc, chunks of 40 tokens": _split("grpc", *small_chunks),
        "shm, three encoders": _split("shm", num_encoders=3),
        "shm, --dp 2": _split("shm", dp=2),
        "shm, no caches": _split("shm", "--no-prefix-cache", encoder_flags=no_embedding_cache),
        "shm, asked again, from the caches": _split("shm", rounds=2),
        "shm, KV memory for a few": _split("shm", "--kv-cache-tokens", "2048"),
        FP8: _split("shm", "--quantization", "fp8"),
        "shm, KV cache in FP8": _split("shm", "--kv-cache-dtype", "fp8"),
    }
    if torch.cuda.is_available():
        found |= {
            "cuda_ipc": _split("cuda_ipc"),
            "cuda_ipc, chunks of 40 tokens": _split("cuda_ipc", *small_chunks),
            "cuda_ipc, no CUDA graphs": _split("cuda_ipc", encoder_flags=("--no-cuda-graphs",)),
            "cuda_ipc, FP8": _split("cuda_ipc", encoder_flags=("--quantization", "fp8")),
        }
    return found | {ABLATION: _split("shm")}


def _split(
    transport: str,
    *worker_flags: str,
    num_encoders: int = 1,
    dp: int = 1,
    encoder_flags: Sequence[str] = (),
    rounds: int = 1,
) -> Answer:
    ask = functools.partial(
        answers_of_split,
        num_encoders=num_encoders,
        dp=dp,
        encoder_flags=encoder_flags,
        worker_flags=("--transport", transport, *worker_flags),
        rounds=rounds,
    )
    return lambda folder, questions: asyncio.run(ask(folder, questions))


def _print_wrong(questions: Sequence[AskedQuestion], answers: Sequence[str]) -> None:
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if answer.strip() != question.answer:
            print(f"  {index}: {question.text} {question.answer!r}, answered {answer!r}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
