"""Restricts logits to the tokens that grammars allow: masks are filled on the host and applied on the device.

Shapes: K constrained sequences of a step, V vocabulary, W = V / 32 words of a mask, B = V / 8 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property

import torch
from llguidance import LLExecutor

from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher, fill_masks
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.engine.staging_buffer import PinnedStagingBuffer

_MAX_THREADS = 8


class GrammarMasks:
    """The masks of one step. Allocates nothing, and starts no threads, before they are first needed."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._masks: PinnedStagingBuffer | None = None

    def apply(
        self,
        matchers: Sequence[GrammarMatcher],
        params: Sequence[SamplingParams],
        logits_KV: torch.Tensor,
        unchanged_KV: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the logits with those of tokens that the grammar does not allow at minus infinity.

        Args:
            unchanged_KV: logits before other sampling parameters. Where these leave a request no token that its grammar
                allows, the grammar alone decides.
        """
        is_excluded_KV = self._excluded(matchers, params)
        masked_KV = logits_KV.masked_fill(is_excluded_KV, -torch.inf)
        if any(each.excludes_tokens for each in params):
            is_empty_K1 = masked_KV.amax(-1, keepdim=True) == -torch.inf
            masked_KV = torch.where(is_empty_K1, unchanged_KV.masked_fill(is_excluded_KV, -torch.inf), masked_KV)
        return masked_KV

    def _excluded(self, matchers: Sequence[GrammarMatcher], params: Sequence[SamplingParams]) -> torch.Tensor:
        """Whether the grammar excludes a token, bool [K, V] on the device."""
        num_rows, masks = len(matchers), self._buffer(len(matchers))
        masks_KW = masks.writable()[:num_rows]
        fill_masks(self._executor, matchers, masks_KW)
        for matcher, each, mask_W in zip(matchers, params, masks_KW, strict=True):
            matcher.finish_mask(mask_W, each.stop_token_ids)
        masks.copy_to_device((slice(num_rows),))
        bytes_KB = masks.tensor[:num_rows].view(torch.uint8)
        bits_KV = (bytes_KB[:, :, None] & self._bit_of_place).flatten(1)
        return bits_KV[:, : self._vocab_size] == 0

    def _buffer(self, num_rows: int) -> PinnedStagingBuffer:
        if self._masks is None or len(self._masks.tensor) < num_rows:
            # A power of two, so that it is seldom replaced.
            shape = (1 << (num_rows - 1).bit_length(), -(-self._vocab_size // 32))
            self._masks = PinnedStagingBuffer(shape, torch.int32, self._device)
        return self._masks

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // 2)))

    @cached_property
    def _bit_of_place(self) -> torch.Tensor:
        return torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=self._device)
