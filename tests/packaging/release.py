"""What the release workflow asks: is the tag the project's version, and what has changed in it?

python3 tests/packaging/release.py [TAG]     exit code 1 and the reason if TAG does not fit; without one, versions alone
python3 tests/packaging/release.py --notes   prints the changelog's section of the version
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> int:
    version = str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if arguments == ["--notes"]:
        print(notes(changelog, version))
        return 0
    wrong = faults("".join(arguments), version, (ROOT / "helm/vitrine/Chart.yaml").read_text(), changelog)
    print("\n".join(wrong) or f"version {version}", file=sys.stderr if wrong else sys.stdout)
    return int(bool(wrong))


def faults(tag: str, version: str, chart: str, changelog: str) -> list[str]:
    """Says what must be mended before a release of `version`.

    Args:
        tag: of the release; empty if none is made.
        chart: the text of Chart.yaml.
    """
    of_chart = dict(re.findall(r"(?m)^(version|appVersion): (\S+)$", chart))
    found = [
        f"Chart.yaml: {key} is {of_chart.get(key)}, the project's version {version}: set both to the same"
        for key in ("version", "appVersion")
        if of_chart.get(key) != version
    ]
    if tag and tag != f"v{version}":
        found.append(
            f"the tag is {tag}, but pyproject.toml says {version}: tag v{version}, or change the version first"
        )
    if tag and not notes(changelog, version):
        found.append(f"CHANGELOG.md has no section [{version}]: give what is under Unreleased that heading")
    return found


def notes(changelog: str, version: str) -> str:
    """The section of a version, without its heading; empty if there is none."""
    match = re.search(rf"(?ms)^## \[{re.escape(version)}\].*?$(.*?)(?=^## \[|\Z)", changelog)
    return match[1].strip() if match else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
