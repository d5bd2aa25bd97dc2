"""Writes held-out pictures and videos as files: `python -m benchmarks.accuracy.pictures FOLDER`.

Prints a question about each and its answer, to try `make run IMAGE=file PROMPT=question` with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.questions import held_out_questions

_SUFFIXES = {"image": "png", "video": "mp4"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--questions", type=int, default=22, help="how many; default: %(default)s")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for index, question in enumerate(held_out_questions(options.questions)):
        names = []
        for place, media in enumerate(question.media):
            name = f"{index:03}{'abc'[place] if len(question.media) > 1 else ''}.{_SUFFIXES[media.kind]}"
            (options.folder / name).write_bytes(media.data)
            names.append(name)
        print(f"{' '.join(names)}: {question.text} {question.answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
