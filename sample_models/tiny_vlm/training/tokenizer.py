"""A byte-level BPE of 480 tokens, trained on the questions, with Qwen's special tokens and a short ChatML template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vitrine_vlm.sample_models.random_checkpoint.byte_tokenizer import write_tokenizer
from vitrine_vlm.sample_models.tiny_vlm.data.generator import KINDS, draw_question

VOCAB_SIZE = 480
# Qwen3-VL's special tokens up to the media placeholders, in its order (tokenizer_config.json of the released models).
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_TOKEN_IDS = {token: VOCAB_SIZE - len(SPECIAL_TOKENS) + index for index, token in enumerate(SPECIAL_TOKENS)}
# Qwen2's: contractions, words with the character before them, single digits, punctuation, line ends, other white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_TRAINING_QUESTIONS = 1100


def save_tokenizer(folder: Path) -> None:
    """Trains the tokenizer; writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    if ids != SPECIAL_TOKEN_IDS:
        raise ValueError(
            f"the questions gave too few merges: special tokens are at {ids}, expected {SPECIAL_TOKEN_IDS}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)


def _corpus() -> Iterator[str]:
    """Yields questions and answers, without the printed words, which must be spelled out of smaller tokens."""
    for index in range(_NUM_TRAINING_QUESTIONS):
        _, question = draw_question("train", index)
        yield from ("user", question.text, "assistant")
        if KINDS[index % len(KINDS)] not in ("word", "pictures"):
            yield question.answer
