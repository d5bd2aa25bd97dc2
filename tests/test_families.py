"""A family is named in its files and in the registry beside them, and nowhere else in the packages that serve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vitrine_vlm.encoder_service import families as encoder_families
from vitrine_vlm.llm_worker import families as worker_families
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "encoder_service",
    "llm_worker",
    "embedding_transport",
    "gateway",
    "vllm_connector",
    "model_loading",
    "gpu_kernels",
    "service_runtime",
    "vitrine_vlm",
)
OF_FAMILIES = (
    ROOT / "encoder_service" / "families",
    ROOT / "llm_worker" / "families",
    ROOT / "gateway" / "families.py",  # what vLLM takes of each
    # Subclasses of vLLM's own models, which have these names, and where they are registered with vLLM.
    ROOT / "vllm_connector" / "qwen3_vl.py",
    ROOT / "vllm_connector" / "qwen2_5_vl.py",
    ROOT / "vllm_connector" / "plugin.py",
)


def family_names() -> set[str]:
    """What a family is called, without its version: of all model types and of all files that stand for a family."""
    model_types = {each for family in encoder_families.FAMILIES for each in family.model_types}
    model_types |= {each for family in worker_families.FAMILIES for each in family.model_types}
    names = {re.split(r"[\d_]", each)[0] for each in model_types}
    assert names and all(len(name) >= 4 for name in names), names
    return names


def naming_lines(names: set[str], files: list[Path]) -> list[str]:
    pattern = re.compile("|".join(map(re.escape, sorted(names))), re.IGNORECASE)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line.replace("qwen-vl-utils", "")) or pattern.search(path.name)  # a package, as a source
    ]


def test_no_module_outside_the_families_folders_names_a_family() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    outside = [path for path in files if not any(path.is_relative_to(each) for each in OF_FAMILIES)]
    assert len(outside) > 100, "the packages were not found"
    assert naming_lines(family_names(), outside) == []
    assert naming_lines(family_names(), files), "the families' own files name them: the search finds nothing"


def test_no_model_type_is_of_two_families() -> None:
    for families in (encoder_families.FAMILIES, worker_families.FAMILIES):
        model_types = [each for family in families for each in family.model_types]
        assert len(model_types) == len(set(model_types))


def test_every_vision_tower_has_a_text_model_or_a_word_on_where_it_is(tmp_path: Path) -> None:
    for model_type in (each for family in encoder_families.FAMILIES for each in family.model_types):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"model_type": "{model_type}", "architectures": ["TheModel"]}}')
        checkpoint = Checkpoint(folder, "model", "revision")
        try:
            assert model_type in worker_families.family_of(checkpoint).model_types
        except CheckpointError as error:
            assert "no text model for TheModel" in str(error) and "vLLM or SGLang" in str(error)


def test_a_model_type_that_neither_service_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    checkpoint = Checkpoint(tmp_path, "model", "revision")
    with pytest.raises(CheckpointError, match="'llava' has no vision tower here; supported are qwen3_vl, "):
        encoder_families.family_of(checkpoint)
    with pytest.raises(CheckpointError, match="'llava' has no decoder here; supported are qwen3_vl, "):
        worker_families.family_of(checkpoint)


def test_families_are_known_without_triton() -> None:
    """A module that is None in sys.modules cannot be imported, as where it is not installed."""
    without_triton = "import sys; sys.modules['triton'] = None; "
    code = without_triton + "from vitrine_vlm.encoder_service.families import FAMILIES; assert FAMILIES"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
