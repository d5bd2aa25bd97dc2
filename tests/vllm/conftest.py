"""Tests beside unmodified vLLM: `make test-vllm` makes its environment and runs them; other runs leave them out.

The tests, transformers as the reference, and the encoders run in the project's own environment, vLLM in one of its own,
because the two need different versions of transformers.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.vllm.checkpoints import CHECKPOINTS, Folders, make_checkpoints
from tests.vllm.questions import NUM_TOKENS, Answers, IntervalReference, Questions, References, questions_for
from tests.vllm.server import is_vllm_0_30, vllm_environment
from vitrine_vlm.sample_models.reference import Reference

NUM_QUESTIONS = 40  # of each checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-python", type=Path, help="the Python interpreter of the environment that has vLLM")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    # This option is unknown where these files are not what the command line names.
    return True if config.getoption("--vllm-python", None) is None else None


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    python: Path = request.config.getoption("--vllm-python")
    return python.absolute()


@pytest.fixture(scope="session")
def connector_metrics(vllm_python: Path) -> None:
    """Of a test that is about the connector's metrics in vLLM's /metrics."""
    if is_vllm_0_30(vllm_python):
        pytest.skip("vLLM has metrics of connectors from 0.31 on")


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def references(folders: Folders) -> References:
    return {name: Reference(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def vllm_references(vllm_python: Path, folders: Folders, references: References) -> References:
    """The same, with the times of videos that vLLM's own processor makes.

    That of vLLM 0.30 gives the one of Qwen2.5-VL no frame rate, which takes two frames of 24 a second as a patch then.
    """
    if not is_vllm_0_30(vllm_python):
        return references
    return {**references, "qwen2_5_vl": IntervalReference(folders["qwen2_5_vl"], interval_s=2 / 24)}


@pytest.fixture(scope="session")
def questions(folders: Folders) -> Questions:
    return {name: questions_for(name, folder, NUM_QUESTIONS) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def expected(references: References, questions: Questions) -> Answers:
    """Token ids by transformers, with the times that videos have."""
    return {name: [question.expected(references[name]) for question in asked] for name, asked in questions.items()}


@pytest.fixture(scope="session")
def vllm_expected(vllm_references: References, questions: Questions) -> Answers:
    """Token ids by transformers, with the times of videos that vLLM's own processor makes."""
    return {name: [question.expected(vllm_references[name]) for question in asked] for name, asked in questions.items()}


@pytest.fixture(scope="session")
def own_tower(
    vllm_python: Path,
    vllm_cache: Path,
    folders: Folders,
    questions: Questions,
) -> Answers:
    """Token ids by vLLM with its own tower."""
    asked, answers = vllm_cache / "questions.json", vllm_cache / "answers.json"
    messages = {str(folders[name]): [question.messages for question in questions[name]] for name in CHECKPOINTS}
    asked.write_text(json.dumps(messages))
    script = Path(__file__).with_name("own_tower.py")
    environment = vllm_environment(vllm_cache) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run([vllm_python, script, asked, answers, str(NUM_TOKENS)], env=environment, cwd=vllm_cache, check=True)
    answered = json.loads(answers.read_text())
    return {name: answered[str(folders[name])] for name in CHECKPOINTS}
