"""The tiny model, served by a real encoder and worker, and real clients of it.

`make test` installs the clients, each group in an environment of its own below the project's.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import openai
import pytest

from tests.clients.client_process import ClientProcess
from tests.clients.questions import Questions
from tests.integration.fleet import Fleet, start_fleet
from vitrine_vlm.sample_models.reference import Reference
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

ENVIRONMENTS = Path(sys.prefix) / "clients"
_HERE = Path(__file__).parent
_PYTHON_CLIENTS = {
    "openai": "python",
    "langchain": "python",
    "litellm": "python",
    "pydantic_ai": "python",
    "lm_eval": "python",
    "instructor": "instructor",
}
_NODE_CLIENTS = ("openai", "ai_sdk", "ai_sdk_compatible")


class Call(Protocol):
    """Calls a function of a client: of callers/with_NAME.py, or for node_NAME of node/with_NAME.mjs."""

    def __call__(self, client: str, function: str, **arguments: Any) -> Any: ...


@pytest.fixture(scope="session")
def client_fleet() -> Iterator[Fleet]:
    with start_fleet(MODEL_FOLDER, transports=["shm"], worker_flags=["--no-dashboard"]) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def base_url(client_fleet: Fleet) -> str:
    return f"http://{client_fleet.worker_processes['shm'].addresses['http']}/v1"


@pytest.fixture(scope="session")
def questions() -> Questions:
    return Questions(MODEL_FOLDER)


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Node looks for packages beside the files that import them."""
    folder = tmp_path_factory.mktemp("node") / "clients"
    shutil.copytree(_HERE / "node", folder)
    (folder / "node_modules").symlink_to(ENVIRONMENTS / "node" / "node_modules")
    return folder


@pytest.fixture(scope="session")
def client_processes() -> Iterator[dict[str, ClientProcess]]:
    """By name, as they are started."""
    processes: dict[str, ClientProcess] = {}
    yield processes
    for process in processes.values():
        process.close()


@pytest.fixture(scope="session")
def call(
    client_processes: dict[str, ClientProcess], request: pytest.FixtureRequest, base_url: str, client_fleet: Fleet
) -> Call:
    def call(client: str, function: str, **arguments: Any) -> Any:
        if client not in client_processes:
            client_processes[client] = _start(client, request)
        arguments = {"base_url": base_url, "model": client_fleet.folder.name, **arguments}
        return client_processes[client].call(function, **arguments)

    return call


@pytest.fixture(scope="session")
def random_fleet(qwen3_vl_folder: Path) -> Iterator[Fleet]:
    """A random checkpoint, whose answers depend on every bit of what it is asked."""
    with start_fleet(qwen3_vl_folder, transports=["shm"], worker_flags=["--no-dashboard"]) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def random_server(random_fleet: Fleet) -> dict[str, Any]:
    """Of a client's calls, in place of the tiny model."""
    address = random_fleet.worker_processes["shm"].addresses["http"]
    return {"base_url": f"http://{address}/v1", "model": random_fleet.folder.name}


@pytest.fixture
def random_client(random_server: dict[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=random_server["base_url"], api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def random_reference(qwen3_vl_folder: Path) -> Reference:
    return Reference(qwen3_vl_folder)


def _start(client: str, request: pytest.FixtureRequest) -> ClientProcess:
    if client in _PYTHON_CLIENTS:
        python = ENVIRONMENTS / _PYTHON_CLIENTS[client] / "bin" / "python"
        if not python.exists():
            pytest.skip(f"{python} is missing: `make test` installs it")
        return ClientProcess([python, "run_calls.py", f"with_{client}"], _HERE / "callers")
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    if not (ENVIRONMENTS / "node" / "node_modules" / "openai").exists():
        pytest.skip("Node's clients are missing: `make test` installs them where there is npm and a network")
    name = client.removeprefix("node_")
    assert name in _NODE_CLIENTS, client
    return ClientProcess(["node", "run_calls.mjs", f"with_{name}"], request.getfixturevalue("node_folder"))
