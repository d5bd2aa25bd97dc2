"""Chat templates from any file of a checkpoint, and text in whole characters only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

CHAT = Chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])


def tokenizer(folder: Path) -> PromptTokenizer:
    return PromptTokenizer(open_checkpoint(str(folder)))


@pytest.fixture
def folder(tmp_path: Path, qwen3_vl_folder: Path) -> Path:
    return shutil.copytree(qwen3_vl_folder, tmp_path / "copy")


def test_template_beside_the_tokenizer_or_in_a_file_of_its_own(folder: Path) -> None:
    expected = tokenizer(folder).render_chat(CHAT)
    assert "<|image_pad|>" in expected.text and expected.text.endswith("<|im_start|>assistant\n")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BadRequest, match="no chat template"):
        tokenizer(folder).render_chat(CHAT)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert tokenizer(folder).render_chat(CHAT) == expected


def test_a_template_that_refuses_is_the_requests_fault(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only one message, please') }}")
    with pytest.raises(BadRequest, match="only one message"):
        tokenizer(folder).render_chat(CHAT)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="skip-tokenizer-init"):
        tokenizer(folder)


def test_characters_come_out_whole_and_special_tokens_not_at_all(qwen3_vl_folder: Path) -> None:
    prompt = tokenizer(qwen3_vl_folder)
    text = "naïve 猫 🐈 end"
    ids = prompt.encode(text)
    assert len(ids) == len(text.encode())
    pieces = []
    detokenizer = prompt.detokenizer()
    for token_id in [*ids[:8], *prompt.encode("<|im_end|>"), *ids[8:]]:
        pieces.append(detokenizer.push(token_id))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_bytes_of_tokens_put_together_are_the_text(qwen3_vl_folder: Path) -> None:
    prompt = tokenizer(qwen3_vl_folder)
    text = "naïve 猫 🐈<|im_end|> \n\x00end"
    ids = prompt.encode(text)
    assert b"".join(prompt.bytes_of(token_id) for token_id in ids) == text.encode()
    assert prompt.bytes_of(10**6) == b""  # models have more logits than their tokenizer has tokens


def test_bad_words_are_found_at_the_start_of_a_text_and_behind_a_space(qwen3_vl_folder: Path) -> None:
    """As vLLM's: a word has another token behind a space in most vocabularies, but not in one of bytes."""
    trained = tokenizer(MODEL_FOLDER)
    alone, behind_space = trained.encode("red"), trained.encode(" red")
    assert alone != behind_space and len(alone) == len(behind_space) == 1
    assert trained.bad_word_ids(["red"]) == trained.bad_word_ids([" red"]) == (tuple(alone), tuple(behind_space))
    bytes_only = tokenizer(qwen3_vl_folder)
    assert bytes_only.bad_word_ids(["red", "a"]) == (tuple(bytes_only.encode("red")), tuple(bytes_only.encode("a")))
    with pytest.raises(BadRequest, match="no tokens"):
        trained.bad_word_ids(["red", " "])
