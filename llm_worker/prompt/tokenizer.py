"""The checkpoint's tokenizer and chat template. Outside `prompt/` no file of the worker imports transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.prompt.chat_template import Chat, ChatTemplate
from vitrine_vlm.llm_worker.prompt.client_text import ChatText, TextEncoder
from vitrine_vlm.llm_worker.prompt.text_bound import TextBound
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_MAX_BAD_WORD_CHARS = 256
_MANY_TOKENS = 4096
# Byte-level tokenizers represent every byte by one printable character.
_BYTE_OF: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}


class PromptTokenizer:
    """Turns text into ids, ids into text, and messages into text.

    bound: of a text's tokens, from its length.

    Args:
        special_tokens_in_text: whether control tokens in the text of a chat's messages are control tokens.
        trust_request_templates: whether requests may bring chat templates.

    Raises:
        CheckpointError: the checkpoint has no tokenizer that can be loaded.
    """

    def __init__(
        self, checkpoint: Checkpoint, special_tokens_in_text: bool = False, trust_request_templates: bool = False
    ) -> None:
        # transformers makes an empty tokenizer where there is none.
        if not any((checkpoint.folder / name).is_file() for name in _TOKENIZER_FILES):
            raise CheckpointError(
                f"none of {', '.join(_TOKENIZER_FILES)} in {checkpoint.folder}: add the tokenizer's files "
                "or start with --skip-tokenizer-init"
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no tokenizer in {checkpoint.folder}: {error}; add its files or start with --skip-tokenizer-init"
            ) from error
        added = self._tokenizer.added_tokens_decoder
        self._added_token_ids = frozenset(added)
        self._encoder = TextEncoder(self._tokenizer.backend_tokenizer, added)
        self.bound = TextBound(self._tokenizer.backend_tokenizer, added.values())
        # Older checkpoints have the template in a file of its own.
        source = self._tokenizer.chat_template or checkpoint.json("chat_template.json").get("chat_template")
        self._template = ChatTemplate(self._tokenizer, source, not special_tokens_in_text, trust_request_templates)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without added tokens; special tokens in it are recognized. Safe on any thread."""
        # Not transformers' own encode, which sets truncation on the shared tokenizer while other threads may use it.
        return self._encoder.encode(text)

    def encode_chat(self, chat: ChatText) -> list[int]:
        """Returns the ids of a chat; only the template's special tokens are recognized. Safe on any thread."""
        return self._encoder.encode(chat)

    def encode_in_pieces(self, prompt: str | ChatText, from_end: bool = False) -> Iterator[list[int]]:
        """Yields the ids of a text or a chat in lists; see `TextEncoder.encode_in_pieces`. Safe on any thread."""
        return self._encoder.encode_in_pieces(prompt, from_end)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Returns the text of the ids. Safe on any thread."""
        if len(token_ids) > _MANY_TOKENS and not self._tokenizer.clean_up_tokenization_spaces:
            # `decode` holds the interpreter's lock, which a batch does not.
            batch = self._tokenizer.backend_tokenizer.decode_batch([list(token_ids)], skip_special_tokens)
            return str(batch[0])
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Returns the token sequences of these words, each also as it is written behind a space.

        Source: vllm/sampling_params.py (0.32), SamplingParams.update_from_tokenizer.

        Raises:
            BadRequest: a word has no tokens, or is too long.
        """
        found: list[tuple[int, ...]] = []
        for word in words:
            if len(word) > _MAX_BAD_WORD_CHARS:
                raise BadRequest(
                    f"bad_words has a word of {len(word)} characters: at most {_MAX_BAD_WORD_CHARS} are accepted",
                    "bad_words",
                )
            alone, behind_space = (tuple(self.encode(space + word.lstrip())) for space in ("", " "))
            if not alone:
                raise BadRequest(f"bad_words has {word!r}, which has no tokens: leave it out", "bad_words")
            found.append(alone)
            # Otherwise the space is a token of its own, and the word behind it is found by its own tokens.
            if behind_space[0] != alone[0] and len(behind_space) == len(alone):
                found.append(behind_space)
        return tuple(found)

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself, for log-probabilities; it may be part of a character."""
        text: str = self._tokenizer.decode([token_id])
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes of the UTF-8 text; those of all tokens of a text, joined, are valid."""
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._added_token_ids:
            return (token or "").encode()
        return bytes(_BYTE_OF[character] for character in token)

    def for_grammars(self, vocab_size: int, eos_token_ids: Collection[int]) -> LLTokenizer:
        """Returns the vocabulary as token masks are made from it; takes a second for 150,000 tokens.

        Args:
            vocab_size: of the model's logits. eos_token_ids: the model's end tokens.
        """
        texts = _TextTokens(self, self._tokenizer.added_tokens_decoder, vocab_size, sorted(eos_token_ids))
        return LLTokenizer(TokenizerWrapper(texts), n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)

    def render_chat(self, chat: Chat) -> ChatText:
        """Returns a chat's prompt; see `ChatTemplate.render`."""
        return self._template.render(chat)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self._tokenizer.backend_tokenizer, skip_special_tokens)


class Detokenizer:
    """The text of one generation, token by token, in whole characters only."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Returns the text that this token completes; empty in the middle of a character and for a skipped token."""
        return self._stream.step(self._tokenizer, token_id) or ""


class _TextTokens:
    """The tokens' bytes in an answer's text, as llguidance asks for them.

    Special tokens have none, as the text leaves them out. Added tokens that are not special, as `<tool_call>`, have
    those of their text, so that one grammar fits models with and without such a token.
    """

    bos_token_id = None

    def __init__(
        self, tokenizer: PromptTokenizer, added: dict[int, Any], vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._encode = tokenizer.encode
        self.special_token_ids = [token_id for token_id, token in added.items() if token.special]
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else 0
        self.tokens = [tokenizer.bytes_of(token_id) for token_id in range(vocab_size)]
        special = set(self.special_token_ids)
        self._bytes = [b"" if index in special else each for index, each in enumerate(self.tokens)]
        self._of_bytes = {each: index for index, each in enumerate(self._bytes) if len(each) == 1}

    def __call__(self, text: str) -> list[int]:
        """The tokens in which the model itself would write this text, which a grammar demands."""
        token_ids, wanted = self._encode(text), text.encode()
        if b"".join(self._bytes[each] for each in token_ids) == wanted:
            return token_ids
        # The tokenizer has changed the text, as to another Unicode form, or has found a special token in it.
        return [self._of_bytes[wanted[index : index + 1]] for index in range(len(wanted))]
