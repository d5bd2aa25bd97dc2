"""How far an answer has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from vitrine_vlm.errors import BadRequest, InternalError

_EVERY_TOKEN = -1


class GrammarMatcher:
    """The matcher of one answer. Belongs to the engine's thread.

    inner: llguidance's; it never raises, and stays in a state of error once it is in one.
    """

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self.inner = matcher
        self._eos_token_ids = tuple(tokenizer.eos_tokens)

    def accept(self, token_id: int) -> bool:
        """Goes on by the answer's next token, which ends no answer by itself; returns whether none can follow it.

        Raises:
            BadRequest: the grammar needs too much work at this place.
            InternalError: the grammar does not allow the token.
        """
        if self.inner.is_error():
            reason = self.inner.get_error().partition("\n<")[0]
            raise BadRequest(f"the grammar is too complex at this place of the answer: {reason}")
        if not self.inner.consume_token(token_id):
            raise InternalError(f"token {token_id} was chosen and the grammar does not allow it")
        return self.inner.is_stopped()

    def finish_mask(self, mask_W: np.ndarray, stop_token_ids: frozenset[int]) -> None:
        """Allows stop tokens where the answer may end, and no other end token.

        Args:
            mask_W: as `fill_masks` has filled it.
        """
        if self.inner.is_error():
            mask_W[:] = _EVERY_TOKEN  # whichever is chosen, `accept` raises the error
            return
        if not self.inner.is_accepting():
            return
        for token_id in self._eos_token_ids:
            _set_bit(mask_W, token_id, False)
        for token_id in stop_token_ids:
            _set_bit(mask_W, token_id, True)
        if not mask_W.any():  # no token can follow and none ends the answer, as where it has to be empty
            for token_id in self._eos_token_ids:
                _set_bit(mask_W, token_id, True)


def fill_masks(executor: LLExecutor, matchers: Sequence[GrammarMatcher], masks_KW: np.ndarray) -> None:
    """Writes a bit for each token of the vocabulary, set where the grammar allows it; the lowest bit is the first.

    Args:
        masks_KW: int32, contiguous, a row for each matcher.
    """
    inner = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
    executor.unsafe_compute_mask_ptr(inner, masks_KW.ctypes.data, masks_KW.shape[1] * 4, len(inner))


def _set_bit(mask_W: np.ndarray, token_id: int, value: bool) -> None:
    if not 0 <= token_id < len(mask_W) * 32:  # others are never chosen
        return
    bits = mask_W.view(np.uint8)
    if value:
        bits[token_id // 8] |= 1 << token_id % 8
    else:
        bits[token_id // 8] &= 0xFF ^ 1 << token_id % 8
