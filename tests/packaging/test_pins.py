"""constraints.txt pins all that is installed for development: no release of another project changes what is tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def needed(distribution: str, extras: frozenset[str], found: dict[str, bool], seen: set[tuple[str, str]]) -> None:
    """Adds what an installed distribution needs, by name, and whether something that needs it pins it."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return  # of another platform, or not installed yet
    for requirement in map(Requirement, lines):
        for extra in extras | {""}:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                name = canonicalize_name(requirement.name)
                exact = any(each.operator == "==" and "*" not in each.version for each in requirement.specifier)
                found[name] = found.get(name, False) or exact
                step = (name, ",".join(sorted(requirement.extras)))
                if step not in seen:
                    seen.add(step)
                    needed(name, frozenset(requirement.extras), found, seen)


def test_everything_is_pinned() -> None:
    pins = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert all(each.operator == "==" for pin in pins for each in pin.specifier) and all(pin.specifier for pin in pins)
    assert len(set(names)) == len(names)
    found: dict[str, bool] = {}
    needed("vitrine-vlm", frozenset({"dev"}), found, set())
    assert {"torch", "triton", "tzdata", "cloudpickle", "multidict", "sortedcontainers"} <= set(found), (
        "not all are seen"
    )
    # Torch's CUDA builds pin NVIDIA's libraries themselves.
    assert not {name for name, exact in found.items() if not exact} - set(names) - {"vitrine-vlm"}
