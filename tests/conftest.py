"""Small random checkpoints of the true architectures, made once a session, and which files share a test process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from vitrine_vlm.sample_models.random_checkpoint import Family, save_random_checkpoint

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

# The same examples each time, and no deadline, as the machine may be busy. `make fuzz` looks for others.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("suite")

# Files whose tests share a session's fleet, by the fixture that starts it. Each process of pytest-xdist has fixtures of
# its own, so these files run in one of them.
_FILES_OF_FLEET = {
    "fleet_processes": ("test_parity.py", "test_canaries.py"),
    "small_fleet": ("test_bad_input.py", "test_openai_client.py", "test_worker_process.py"),
}
_FLEET_OF_FILE = {f"tests/integration/{file}": fleet for fleet, files in _FILES_OF_FLEET.items() for file in files}
# All files of this folder share fleets, and processes of clients.
_CLIENTS = "tests/clients/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """--dist loadfile takes files that share a fleet for one file."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadFleetScheduling(LoadFileScheduling):  # type: ignore[misc]  # untyped
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return _CLIENTS if file.startswith(_CLIENTS) else _FLEET_OF_FILE.get(file, file)

    return LoadFleetScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _folder_of(family: Family) -> Any:
    """A fixture: the family's checkpoint folder."""

    @pytest.fixture(scope="session", name=f"{family}_folder")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_random_checkpoint(tmp_path_factory.mktemp(family), family)

    return folder


qwen3_vl_folder = _folder_of("qwen3_vl")
qwen3_vl_moe_folder = _folder_of("qwen3_vl_moe")
qwen2_5_vl_folder = _folder_of("qwen2_5_vl")
qwen3_5_folder = _folder_of("qwen3_5")
qwen3_5_moe_folder = _folder_of("qwen3_5_moe")
qwen4_exp_folder = _folder_of("qwen4_exp")
qwen3_omni_moe_folder = _folder_of("qwen3_omni_moe")

# Those that both services have, and those of which the encoder alone has its half.
WHOLE_FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")
TOWER_FAMILIES = ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen3_omni_moe")


@pytest.fixture(scope="session", params=WHOLE_FAMILIES)
def checkpoint_folder(request: pytest.FixtureRequest) -> Path:
    """Runs the test once for each family that can be served whole."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture(scope="session", params=TOWER_FAMILIES)
def tower_only_folder(request: pytest.FixtureRequest) -> Path:
    """Runs the test once for each family of which there is a vision tower alone."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture(scope="session", params=WHOLE_FAMILIES + TOWER_FAMILIES)
def tower_folder(request: pytest.FixtureRequest) -> Path:
    """Runs the test once for each family that has a vision tower here."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder
