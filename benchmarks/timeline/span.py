"""What a process had a device compute, and when: a step of a worker, or a batch of an encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["batch", "decode", "mixed", "prompts"]


@dataclass(frozen=True)
class Span:
    """A step or a batch. Times are seconds of the monotonic clock, which all processes of a host share.

    kind: a batch of an encoder, or a step that decodes, that also has prompts, that has prompts alone.
    num_tokens: tokens of a step, patches of a batch.
    launched_s, returned_s: when the host began to launch it and had launched all of it.
    begin_s, end_s: on the device, waiting for other processes on it included.
    device: names the device in all processes.
    """

    kind: Kind
    num_tokens: int
    launched_s: float
    returned_s: float
    begin_s: float
    end_s: float
    device: str

    @property
    def decodes(self) -> bool:
        return self.kind in ("decode", "mixed")


def write_spans(file: Path, spans: Iterable[Span]) -> None:
    """Writes a JSON line for each span."""
    file.write_text("".join(f"{json.dumps(asdict(span))}\n" for span in spans))


def read_spans(file: Path, begin_s: float, end_s: float) -> list[Span]:
    """Returns those that began within these seconds, in order."""
    spans = (Span(**json.loads(line)) for line in file.read_text().splitlines())
    return sorted((span for span in spans if begin_s <= span.begin_s < end_s), key=lambda span: span.begin_s)
