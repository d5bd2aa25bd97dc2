"""Runs one target for a while with atheris, which is led by what of the code an input reaches: `make fuzz`.

    python -m tests.fuzz TARGET SECONDS

An input that raises, takes over 3 seconds or allocates over 512 MiB ends it with a message, and is kept as crash-*,
timeout-* or oom-* in the folder where it was started.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vitrine_vlm"]):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import TARGETS

LIMITS = ["-timeout=3", "-malloc_limit_mb=512", "-rss_limit_mb=3072", "-max_len=65536", "-print_final_stats=1"]


def main() -> None:
    name, seconds = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds()[name]):
            Path(folder, str(number)).write_bytes(data)
            TARGETS[name](data)  # loads what is loaded once
        atheris.Setup([sys.argv[0], *LIMITS, f"-max_total_time={seconds}", folder], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
