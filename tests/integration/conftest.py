"""A running fleet and its reference for each model family."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.fleet import Fleet, start_fleet
from vitrine_vlm.sample_models.reference import Reference


@pytest.fixture(scope="session")
def reference(checkpoint_folder: Path) -> Reference:
    return Reference(checkpoint_folder)


@pytest.fixture(scope="session")
def fleet_processes(checkpoint_folder: Path) -> Iterator[Fleet]:
    with start_fleet(checkpoint_folder) as fleet:
        yield fleet


@pytest.fixture
async def fleet(fleet_processes: Fleet) -> AsyncIterator[Fleet]:
    """The session's processes with fresh channels: gRPC channels belong to one event loop."""
    async with fleet_processes.connected() as fleet:
        yield fleet


@pytest.fixture(scope="session")
def small_fleet(qwen3_vl_folder: Path) -> Iterator[Fleet]:
    """One encoder that may fetch from loopback and gives up on media after a second, and one worker without a page."""
    flags = ["--allow-private-addresses", "--media-timeout-s", "1"]
    with start_fleet(
        qwen3_vl_folder, transports=["shm"], encoder_flags=flags, worker_flags=["--no-dashboard"]
    ) as fleet:
        yield fleet
