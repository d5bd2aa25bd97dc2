"""The shipped checkpoint is small, complete, what the training makes, and gives the same answers everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

from benchmarks.accuracy.__main__ import ABLATION, ways
from benchmarks.accuracy.ablation import without_deepstack
from benchmarks.accuracy.accuracy import accuracy
from benchmarks.accuracy.questions import AskedQuestion, held_out_questions
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER
from vitrine_vlm.sample_models.tiny_vlm.data.generator import KINDS
from vitrine_vlm.sample_models.tiny_vlm.training.architecture import save_processor_configs, tiny_config

MAX_BYTES = 12 * 2**20
NUM_QUESTIONS = 10 * len(KINDS)
MIN_ACCURACY = 0.95
MAX_ACCURACY_WITHOUT_DEEPSTACK = 0.60
# Another CPU rounds differently: an answer on the edge may tip over.
MIN_SAME = 0.98


@pytest.fixture(scope="module")
def questions() -> list[AskedQuestion]:
    return held_out_questions(NUM_QUESTIONS)


@pytest.fixture(scope="module")
def expected(questions: list[AskedQuestion]) -> list[str]:
    """transformers' answers in one process."""
    return ways()["transformers"](MODEL_FOLDER, questions)


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) <= MAX_BYTES


def test_transformers_loads_it_whole() -> None:
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(MODEL_FOLDER, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert len(model.model.visual.deepstack_merger_list) == 3


def test_it_is_what_the_training_makes(tmp_path: Path) -> None:
    shipped, made = AutoConfig.from_pretrained(MODEL_FOLDER), tiny_config()
    for part in ("text_config", "vision_config"):
        shipped_part, made_part = (getattr(config, part).to_dict() for config in (shipped, made))
        shipped_part.pop("dtype"), made_part.pop("dtype")
        assert shipped_part == made_part
    save_processor_configs(tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert json.loads((MODEL_FOLDER / name).read_text()) == json.loads((tmp_path / name).read_text())


def test_transformers_answers_right(questions: list[AskedQuestion], expected: list[str]) -> None:
    assert accuracy(questions, expected).overall >= MIN_ACCURACY


@pytest.mark.parametrize("way", ["shm", "grpc, chunks of 40 tokens"])
def test_the_split_answers_as_transformers_does(questions: list[AskedQuestion], expected: list[str], way: str) -> None:
    answers = ways()[way](MODEL_FOLDER, questions)
    same = sum(map(str.__eq__, answers, expected)) / len(expected)
    assert same >= MIN_SAME, [pair for pair in zip(answers, expected, strict=True) if pair[0] != pair[1]]
    assert accuracy(questions, answers).overall >= MIN_ACCURACY


def test_lost_deepstack_rows_would_show(questions: list[AskedQuestion], tmp_path: Path) -> None:
    answers = ways()[ABLATION](without_deepstack(MODEL_FOLDER, tmp_path / "model"), questions)
    assert accuracy(questions, answers).overall <= MAX_ACCURACY_WITHOUT_DEEPSTACK
