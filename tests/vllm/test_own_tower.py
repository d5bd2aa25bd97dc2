"""vLLM with its own tower gives transformers' tokens: what the tests of the connector compare with is sound."""

from __future__ import annotations

import pytest

from tests.vllm.checkpoints import CHECKPOINTS, CheckpointName
from tests.vllm.questions import Answers


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_own_tower_gives_the_tokens_of_transformers(
    name: CheckpointName, own_tower: Answers, vllm_expected: Answers
) -> None:
    assert own_tower[name] == vllm_expected[name]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_answers_depend_on_the_pictures(name: CheckpointName, expected: Answers) -> None:
    assert len({tuple(answer) for answer in expected[name]}) > len(expected[name]) / 2
