"""Runs the rendered chart for real, under load, through all that happens to a release: `make cluster`.

Pods are processes with a root, volumes, process ids and an address of their own. Prints a table of what users saw;
the exit status is 1 where a request failed, an answer changed or a service did not end well. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.report import faults, table
from tests.cluster.story import run_all


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--discovery", choices=["kubernetes", "dns"], default="kubernetes", help="the chart's value")
    parser.add_argument("--users", type=int, default=3, help="who ask at the same time; default: %(default)s")
    parser.add_argument("--pause-s", type=float, default=0.2, help="of each user between two requests, s")
    parser.add_argument("--folder", type=Path, help="empty folder for pods and their logs; default: a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        release, users = asyncio.run(run_all(folder.resolve(), options.discovery, options.users, options.pause_s))
    print(table(release.events, users.outcomes))
    again = Counter(failure for each in users.outcomes for failure in each.tries)
    for failure, count in again.most_common():
        print(f"sent again {count} times: {failure}")
    found = faults(users.outcomes, release.cluster.ends)
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
