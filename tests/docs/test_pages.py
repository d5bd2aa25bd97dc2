"""The pages for readers: links lead somewhere, files and commands that are named exist, lines are not too long."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "deploy").rglob("*.md"),
    *(ROOT / "helm").rglob("*.md"),
]
FILES = [str(path) for path in ROOT.rglob("[!.]*") if not {".venv", ".git", "__pycache__"} & set(path.parts)]
FOLDER_NAMES = {Path(file).parent.name for file in FILES}
MAX_LENGTH = 130

pytestmark = pytest.mark.skipif(
    not (ROOT / "encoder_service").exists(), reason="a source distribution has the packages below vitrine_vlm only"
)
on_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_each_page
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page)):
        target, _, anchor = "".join(link).partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append("".join(link))
    assert not broken


@on_each_page
def test_files_that_are_named_exist(page: Path) -> None:
    """Named by the end of their path. Other projects' files are in folders that we do not have."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|proto))`", prose(page))
    ours = [path for path in named if path.split("/")[0] in FOLDER_NAMES or "/" not in path]
    assert not [path for path in ours if not any(file.endswith("/" + path.rstrip("/")) for file in FILES)]


@on_each_page
def test_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^)make ([a-z-]+)(?=`|\s*$|\s+[A-Z#])", text, re.MULTILINE)
    unknown = [target for target in named if target not in targets]
    modules = re.findall(r"python -m ((?:benchmarks|vitrine_vlm)[\w.]*)", text)
    unknown += [module for module in modules if importlib.util.find_spec(module) is None]
    assert not unknown


@on_each_page
def test_lines_are_short(page: Path) -> None:
    """Tables aside, and blocks of code, where a line is a line."""
    long = [line for line in prose(page).splitlines() if len(line) > MAX_LENGTH and not line.startswith("|")]
    assert not long


@on_each_page
def test_diagrams_have_one_statement_a_line(page: Path) -> None:
    """Several in a line are drawn as an error."""
    diagrams = re.findall(r"^```mermaid\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert all(re.fullmatch(r"flowchart \w+|\w+(-v2)?", diagram.splitlines()[0]) for diagram in diagrams)
    assert not [diagram for diagram in diagrams if re.search(r"\S +(subgraph|end\b)", diagram)]
