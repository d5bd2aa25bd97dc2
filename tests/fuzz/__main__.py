"""Runs one target for a while with atheris, which is led by what of the code an input reaches: `make fuzz`.

    python -m tests.fuzz TARGET SECONDS

An input that raises, or takes over 3 CPU seconds, ends it and is kept as crash-TARGET-* where it was started. One that
allocates over 512 MiB at once, or does not return for a minute, ends it, too.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path

import atheris

# Pillow's readers of formats are Python, too; which of them an input reaches leads to others.
INSTRUMENTED = ["vitrine_vlm", "PIL"]

with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import TARGETS

LIMITS = ["-timeout=60", "-malloc_limit_mb=512", "-rss_limit_mb=3072", "-max_len=65536", "-print_final_stats=1"]
MAX_CPU_S = 3.0


def main() -> None:
    name, seconds = sys.argv[1:]
    target = TARGETS[name]

    def run(data: bytes) -> None:
        began = time.process_time()
        try:
            target(data)
            assert time.process_time() - began < MAX_CPU_S, "too slow"
        except BaseException:
            # Not left to libFuzzer, which may be ended by its own alarm before it writes the file.
            Path(f"crash-{name}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds()[name]):
            Path(folder, str(number)).write_bytes(data)
            with atheris.instrument_imports(include=INSTRUMENTED):
                target(data)  # loads what is loaded once; decoders are imported where they are used
        atheris.Setup([sys.argv[0], *LIMITS, f"-max_total_time={seconds}", folder], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
