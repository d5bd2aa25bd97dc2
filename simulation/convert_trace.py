"""`python -m vitrine_vlm.simulation.convert_trace FORMAT FILE > requests.jsonl`: public traces for the simulation.

azure-llm: CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure LLM inference traces 2023 and 2024).
azure-lmm: the same with NumImages (Azure LMM inference trace 2025); ContextTokens count text and pictures.
mooncake: JSON lines with timestamp in milliseconds, input_length, output_length, hash_ids (Mooncake, FAST 2025).

None of them has the sizes of pictures, and the first and the last have no pictures: these are drawn from a seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vitrine_vlm.simulation.costs import MERGE_SIZE, PATCH_SIZE
from vitrine_vlm.simulation.workload import Picture, Pictures, SimulatedRequest

_SIDE = PATCH_SIZE * MERGE_SIZE


@dataclass(frozen=True)
class Row:
    """One request of a trace. at: seconds of any clock; num_context: tokens of the prompt, pictures included.

    num_pictures: None where the trace does not say.
    """

    at: float
    num_context: int
    num_generated: int
    num_pictures: int | None = None


def azure_rows(lines: Iterable[str], *, has_pictures: bool = False) -> Iterator[Row]:
    """
    Source: AzureLLMInferenceDataset2024.md and AzureLMMInferenceDataset2025.md of
    https://github.com/Azure/AzurePublicDataset.

    Raises:
        ValueError: a column is missing, or a value is none.
    """
    for number, fields in enumerate(csv.DictReader(lines), 2):
        try:
            at = datetime.fromisoformat(fields["TIMESTAMP"])
            yield Row(
                (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp(),
                int(fields["ContextTokens"]),
                int(fields["GeneratedTokens"]),
                int(fields["NumImages"]) if has_pictures else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} is no request of an Azure trace: {error!r}") from error


def mooncake_rows(lines: Iterable[str]) -> Iterator[Row]:
    """
    Source: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces. hash_ids, which say which blocks of text are
    the same, are not used.

    Raises:
        ValueError: a line is no such object.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            yield Row(float(fields["timestamp"]) / 1e3, int(fields["input_length"]), int(fields["output_length"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} is no request of a Mooncake trace: {error!r}") from error


FORMATS: dict[str, Callable[[Iterable[str]], Iterator[Row]]] = {
    "azure-llm": azure_rows,
    "azure-lmm": lambda lines: azure_rows(lines, has_pictures=True),
    "mooncake": mooncake_rows,
}


def requests_of(rows: Iterable[Row], pictures: Pictures, num_pictures: int = 0) -> list[SimulatedRequest]:
    """Requests in the order of their arrival, the first at second 0. Numbers below 1 count as 1.

    Args:
        num_pictures: of each request, where the trace does not say; they are added to its text.
    """
    requests: list[SimulatedRequest] = []
    ordered = sorted(rows, key=lambda row: row.at)
    for row in ordered:
        number = num_pictures if row.num_pictures is None else row.num_pictures
        drawn = tuple(pictures.draw() for _ in range(number))
        num_text = row.num_context
        if row.num_pictures:
            # At least one token is text.
            drawn = tuple(_within(picture, (row.num_context - 1) // number) for picture in drawn)
            num_text -= sum(picture.num_tokens for picture in drawn)
        at = row.at - ordered[0].at
        requests.append(SimulatedRequest(at, max(1, num_text), max(1, row.num_generated), drawn))
    return requests


def _within(picture: Picture, num_tokens: int) -> Picture:
    """The picture, or a square one of at most so many tokens, and of one at least."""
    if picture.num_tokens <= num_tokens:
        return picture
    side = max(1, math.isqrt(num_tokens)) * _SIDE
    return replace(picture, height=side, width=side)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vitrine_vlm.simulation.convert_trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=sorted(FORMATS))
    parser.add_argument("file", type=Path)
    parser.add_argument("--num-pictures", type=int, default=0, help="of a request, where the trace does not say")
    parser.add_argument("--repeated", type=float, default=0.0, help="part of the pictures that came before")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' sizes")
    options = parser.parse_args(arguments)
    pictures = Pictures(random.Random(f"{options.seed} trace"), repeated=options.repeated)
    with options.file.open(newline="") as lines:
        try:
            requests = requests_of(FORMATS[options.format](lines), pictures, options.num_pictures)
        except ValueError as error:
            parser.error(f"{options.file}: {error}")
    for request in requests:
        print(json.dumps(asdict(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
