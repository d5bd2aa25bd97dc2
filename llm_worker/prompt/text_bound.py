"""How many tokens a text has at least, from its length alone.

Byte-level tokens stand for bytes of the normalized text: a token of b bytes for b characters at most, as each character
has a byte at least. An added token stands for its own characters. So the characters of the normalized text are at most
as many as its tokens times the length of the longest token.

NFC changes no ASCII. It makes other text shorter by composing characters, and each composed character has a canonical
decomposition of at most four (UAX #15, table of maximum expansion factors); decomposing makes no text shorter. So text
with other characters than ASCII keeps a quarter of its characters at least.
"""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from vitrine_vlm.llm_worker.prompt.text_pieces import preparation

_MOST_COMPOSED = 4


class TextBound:
    """
    max_chars_per_token: the length of the longest token; None for a tokenizer for which the reasons above do not hold.
    """

    def __init__(self, tokenizer: Tokenizer, added: Collection[AddedToken]) -> None:
        self.max_chars_per_token: int | None = None
        normalizer, pre_tokenizers = preparation(tokenizer)
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        if (
            isinstance(tokenizer.model, BPE)
            and normalizer in (None, "NFC")
            and pre_tokenizers[-1:]
            and pre_tokenizers[-1]["type"] == "ByteLevel"
            and vocab.keys() >= set(ByteLevel.alphabet())  # bytes without a token would vanish
            and not any(each.lstrip or each.rstrip for each in added)  # which have the white space around them, too
        ):
            self.max_chars_per_token = max(len(each) for each in (*vocab, *(token.content for token in added)))

    def min_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least."""
        if self.max_chars_per_token is None:
            return 0
        return -(-len(text) // (self.max_chars_per_token * (1 if text.isascii() else _MOST_COMPOSED)))
