"""`make audit`: looks the pinned versions up in the public database of vulnerabilities, by pip-audit.

    python -m tests.packaging.audit PIP-AUDIT

Exit code: 0 nothing is known, 1 a version has a vulnerability or was not looked up, 2 the database is out of reach.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
_FLAGS = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]


def main(pip_audit: str) -> int:
    """Runs `pip_audit`, an executable, and prints what it found."""
    ran = subprocess.run([pip_audit, "--requirement", str(CONSTRAINTS), *_FLAGS], capture_output=True, text=True)
    try:
        report = json.loads(ran.stdout)["dependencies"]
    except (ValueError, KeyError):  # it ends with a traceback where it cannot connect
        report, why = [], (ran.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    else:
        why = "it knows none of them"  # so answer mirrors, which have files alone
    status, lines = judge(report, why)
    print("\n".join(lines))
    return status


def judge(report: list[dict[str, Any]], why: str) -> tuple[int, list[str]]:
    """The exit code and what to print for pip-audit's list of dependencies.

    Args:
        why: the reason to name where no version was looked up.
    """
    skipped = [each["name"] for each in report if "skip_reason" in each]
    if len(skipped) == len(report):
        return 2, [
            f"no version was audited, as the database of vulnerabilities cannot be reached from here ({why}): "
            "run `make audit` where it can"
        ]
    found = [
        f"{each['name']} {each['version']}: {vulnerability['id']}, mended in {vulnerability['fix_versions'] or 'none'}"
        for each in report
        for vulnerability in each.get("vulns", ())
    ]
    unknown = [f"could not be looked up: {', '.join(skipped)}"] if skipped else []
    return int(bool(found or skipped)), [f"{len(report)} versions, {len(found)} vulnerabilities", *found, *unknown]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
