"""The installed packages: one import name, and in the source distribution all that its tests need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vitrine_vlm

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Made here by tools, and in no clone of the repository.
NOT_OURS = shutil.ignore_patterns(".git", ".venv", ".*cache", "__pycache__", "*.egg-info", "build")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=NOT_OURS)
    archive = _build("sdist", folder / "tree", folder / "made")
    with tarfile.open(archive) as opened:
        assert not [member.name for member in opened.getmembers() if member.issym() or member.islnk()]
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel, as pip puts them into site-packages."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(_build("wheel", source, folder / "made")) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def _build(what: str, tree: Path, folder: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(folder)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [made] = folder.iterdir()
    return made


def test_the_installed_names_are_ours_alone(installed: Path) -> None:
    assert {entry.name for entry in installed.iterdir()} == {
        "vitrine_vlm",
        f"vitrine_vlm-{PROJECT['version']}.dist-info",
    }


def test_the_wheel_has_every_module_and_what_is_read_beside_them(installed: Path) -> None:
    package = installed / "vitrine_vlm"
    code = {
        file.relative_to(ROOT)
        for top in (ROOT / "vitrine_vlm").iterdir()
        for file in (ROOT / "vitrine_vlm" / top.name).rglob("*.py")
        if (file.parent / "__init__.py").exists()
    }
    assert len(code) > 200
    assert not {file for file in code if not (installed / file).exists()}
    for name in (
        "py.typed",
        "protos/encoder/v1/encoder.proto",
        "protos/encoder/v1/encoder_pb2.pyi",
        "llm_worker/dashboard/index.html",
        "deploy/ray_serve/config.yaml",
        "sample_models/tiny_vlm/vitrine-tiny-vlm/model.safetensors",
        "sample_models/tiny_vlm/data/words_train.txt",
    ):
        assert (package / name).is_file(), name


def test_its_own_extras_are_its_own(installed: Path) -> None:
    """`vitrine` without `-vlm` is another project's name."""
    [metadata] = installed.glob("*.dist-info/METADATA")
    required = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist: vitrine")]
    assert required and all(line.startswith("Requires-Dist: vitrine-vlm[") for line in required)


def test_the_version_is_one() -> None:
    assert vitrine_vlm.__version__ == PROJECT["version"], "installed before the version changed: install it again"


def test_the_tests_of_a_source_distribution_find_what_they_need(source: Path) -> None:
    files = {file.relative_to(ROOT) for file in (ROOT / "tests").rglob("*") if file.is_file()}
    assert not {file for file in files if "__pycache__" not in file.parts and not (source / file).exists()}
    # Those that read most of the repository's files besides code, and take no time.
    some = ["tests/deploy/docker", "tests/helm/test_images.py", "tests/service_runtime/test_http_errors.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *some]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
