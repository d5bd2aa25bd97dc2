"""Checkpoints that many tests share: small random ones of the true architectures, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploy.random_checkpoint import save_random_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def qwen3_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_checkpoint(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="session")
def qwen3_vl_moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_checkpoint(tmp_path_factory.mktemp("qwen3_vl_moe"), "qwen3_vl_moe")


@pytest.fixture(scope="session")
def qwen2_5_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_checkpoint(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")


@pytest.fixture(scope="session", params=["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def checkpoint_folder(request: pytest.FixtureRequest) -> Path:
    """Runs the test once for each of the three families."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder
