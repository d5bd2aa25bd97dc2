"""The tiny model's tokenizer loses nothing, and the shipped one is the one that the training would learn again."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER
from vitrine_vlm.sample_models.tiny_vlm.training.tokenizer import SPECIAL_TOKEN_IDS, VOCAB_SIZE, save_tokenizer


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.mark.parametrize(
    "text", ["What color is the star?", "Zürich, 東京 – 🙂", "a\tb\r\n\r\n  c", "don't 12345", "", " ", "\u0000\u200d"]
)
def test_round_trip(shipped: PreTrainedTokenizerBase, text: str) -> None:
    assert shipped.decode(shipped.encode(text), skip_special_tokens=False) == text


def test_questions_are_short_and_printed_words_are_spelled(shipped: PreTrainedTokenizerBase) -> None:
    assert len(shipped) == VOCAB_SIZE
    assert len(shipped.encode("What shapes and colors are in this picture?")) < 20
    assert [len(shipped.encode(digits)) for digits in ("7", "42", "90210")] == [1, 2, 5]


def test_special_tokens_are_one_token_each(shipped: PreTrainedTokenizerBase) -> None:
    for token, token_id in SPECIAL_TOKEN_IDS.items():
        assert shipped.encode(token) == [token_id]


def test_learnt_again_it_has_the_same_tokens(shipped: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """But for the order of those that are equally frequent: another FreeType measures text slightly differently."""
    save_tokenizer(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again.get_vocab().keys() - shipped.get_vocab().keys()) < 0.02 * VOCAB_SIZE
    assert again.chat_template == shipped.chat_template
    assert {again.convert_tokens_to_ids(token) for token in SPECIAL_TOKEN_IDS} == set(SPECIAL_TOKEN_IDS.values())
