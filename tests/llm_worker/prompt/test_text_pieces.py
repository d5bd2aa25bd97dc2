"""A text in pieces has the tokens of the whole text, whatever characters stand where it is cut."""

from __future__ import annotations

import random
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN3_5

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.prompt import client_text, text_pieces
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.prompt.client_text import ChatText, TextEncoder
from vitrine_vlm.llm_worker.prompt.text_bound import TextBound
from vitrine_vlm.llm_worker.prompt.text_pieces import can_be_cut, pieces_of
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

# What the patterns, the normalizer and added tokens treat each in a way of its own: white space of all kinds, marks
# that compose, Hangul in parts, characters that NFC makes ASCII, letters and numbers of other scripts, unassigned ones.
CHARACTERS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2028",
    "\u0085",
    "\u3000",
    "\u180e",
    "\u200b",
    "\x1c",
    "\ufeff",
]
CHARACTERS += [
    "a",
    "B",
    "z ",
    "'s",
    "'S",
    "'re",
    " '",
    "\u017f",
    "5",
    "42",
    "\u00b2",
    "\u2167",
    "\u0663",
    "_",
    "-",
    "!",
    "==",
]
CHARACTERS += [",", ".", "\u3001", "\u3002", "\uff0c", "猫", "犬 ", "\u304b", "\u1100\u1161", "\u11a8", "\uac00", "🐈"]
CHARACTERS += ["é", "e\u0301", "\u0301", "\u0338", "\u3099", "\u0345", "\u03c9\u0314\u0342\u0345", "\u0903", "\u0e33"]
CHARACTERS += ["\u212a", "\u1ffd", "\ufb01", "\u0378", "\U0001df00", "<|im_end|>", "<|im_", "|>", "<"]


@pytest.fixture(scope="module", params=[QWEN2, QWEN3_5])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(request.param), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def hostile(random_: random.Random, length: int) -> str:
    return "".join(random_.choices(CHARACTERS, k=length))


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the model merges tokens in: more exact than the tokens of a small vocabulary."""
    assert tokenizer.normalizer is not None and tokenizer.pre_tokenizer is not None
    found = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    return [word for word, _ in found]


def test_text_cut_at_every_place_that_counts_as_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "PIECE_CHARS", 1)
    assert can_be_cut(tokenizer, tokenizer.get_added_tokens_decoder().values())
    random_ = random.Random(5)
    num_pieces = 0
    for _ in range(4000):
        text = hostile(random_, random_.randrange(2, 30))
        pieces = list(pieces_of(text))
        num_pieces += len(pieces)
        assert "".join(pieces) == text
        assert [word for piece in pieces for word in words(tokenizer, piece)] == words(tokenizer, text), pieces
        ids = [each for piece in pieces for each in tokenizer.encode(piece, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, pieces
    assert num_pieces > 8000


def test_prompts_in_pieces_from_either_end(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = PromptTokenizer(open_checkpoint(str(MODEL_FOLDER)))
    random_ = random.Random(6)
    for _ in range(100):
        text = hostile(random_, 100)
        chat = trained.render_chat(Chat([{"role": "user", "content": text}]))
        prompts: list[tuple[str | ChatText, list[int]]]
        prompts = [(text, trained.encode(text)), (chat, trained.encode_chat(chat))]
        with monkeypatch.context() as patch:
            patch.setattr(text_pieces, "PIECE_CHARS", 20)
            patch.setattr(client_text, "_SHORT_TEXT", 10)
            for prompt, expected in prompts:
                pieces = list(trained.encode_in_pieces(prompt))
                assert [each for ids in pieces for each in ids] == expected
                assert list(trained.encode_in_pieces(prompt, from_end=True)) == pieces[::-1]


@pytest.mark.parametrize(
    "added", [AddedToken("a b"), AddedToken("<x>", lstrip=True), AddedToken("<x>", rstrip=True), AddedToken("x.")]
)
def test_a_tokenizer_whose_added_tokens_reach_over_a_cut_gets_whole_texts(added: AddedToken) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    tokenizer.add_tokens([added])
    assert not can_be_cut(tokenizer, tokenizer.get_added_tokens_decoder().values())
    text = "a b. <x> . " * 4000
    encoder = TextEncoder(tokenizer, tokenizer.get_added_tokens_decoder())
    assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_stretch_without_a_place_to_cut_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pieces, "MAX_PIECE_CHARS", 100_000)
    assert [len(each) for each in pieces_of("a" * 99_999 + " b")] == [99_999, 2]
    for text in ("a" * 100_001, "b " * 50_000 + " " * 200_000, "!" * 100_001 + " c"):
        with pytest.raises(BadRequest, match="break it up"):
            list(pieces_of(text))


def test_no_text_has_fewer_tokens_than_its_length_says(tokenizer: Tokenizer) -> None:
    bound = TextBound(tokenizer, list(tokenizer.get_added_tokens_decoder().values()))
    longest = bound.max_chars_per_token
    assert longest == max(map(len, tokenizer.get_vocab()))
    random_ = random.Random(7)
    tokens = [token for token in tokenizer.get_vocab() if len(token) == longest]
    shrinking = ["\u03c9\u0314\u0342\u0345", "\u1100\u1161\u11a8"]
    texts = [tokens[0] * 50, *(each * 50 for each in shrinking), *(hostile(random_, 40) for _ in range(500))]
    for text in texts:
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert bound.min_tokens(text) <= num_tokens
    assert bound.min_tokens(tokens[0] * 50) == 50


def test_no_character_is_composed_of_more_than_four() -> None:
    longest = max(len(unicodedata.normalize("NFD", chr(each))) for each in range(0x110000))
    assert longest == 4


def test_bytes_without_a_token_allow_no_bound(tokenizer: Tokenizer) -> None:
    assert TextBound(tokenizer, [AddedToken("<x>", lstrip=True)]).max_chars_per_token is None
    assert TextBound(tokenizer, [AddedToken("<x>" * 99)]).max_chars_per_token == 297
