"""The model side of a step: tokens and media rows into the buffers, through the decoder, logits out.

Shapes: B rows to sample from, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from llm_worker.engine.config import EngineConfig
from llm_worker.engine.host_twin import HostTwin
from llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from llm_worker.engine.kv_cache import KvCache
from llm_worker.engine.runner import MakeRunner, plain_runner
from llm_worker.engine.scheduler import Chunk
from llm_worker.models.decoder import StepInputs, TextDecoder


@dataclass(frozen=True)
class StepOutput:
    """logits_BV: in the model's dtype, one row for each chunk of `sampling`.

    failed: chunks whose media rows could not be landed, with the reason: what was computed for them does not count.
    """

    sampling: list[Chunk]
    logits_BV: torch.Tensor
    failed: dict[Chunk, Exception]


class ForwardPass:
    """A decoder, or one rank's part of it, with its KV cache and input buffers. Not thread-safe: one step at a time.

    only_starts: a step is computed while its logits are on their way back already, as on a GPU.
    """

    def __init__(self, decoder: TextDecoder, config: EngineConfig, make_runner: MakeRunner = plain_runner) -> None:
        """
        Args:
            make_runner: what runs the decoder over buffers and cache.
        """
        self.decoder = decoder
        self.only_starts = decoder.device.type == "cuda"
        self.kv_cache = KvCache(decoder.config, config.num_blocks, config.block_size, decoder.device, decoder.dtype)
        self.buffer = InputEmbedBuffer(decoder, config.max_num_batched_tokens)
        self._sampled_rows = HostTwin((config.max_num_seqs,), torch.int64, decoder.device)
        self._run_decoder = make_runner(decoder, self.kv_cache, self.buffer)

    def __call__(self, chunks: Many[Chunk]) -> StepOutput:
        """Runs a step of these chunks; their KV is in the cache afterwards."""
        inputs, failed = self.buffer.write(chunks)
        last_rows = {
            chunk: slice_.start + slice_.length - 1
            for chunk, slice_ in zip(chunks, inputs.sequences, strict=True)
            if chunk.samples and chunk not in failed
        }
        logits_BV = self.run(inputs, list(last_rows.values()))
        self.buffer.landed = {}  # or it would hold on to encoders' memory until the next step
        return StepOutput(list(last_rows), logits_BV, failed)

    def run(self, inputs: StepInputs, rows: list[int]) -> torch.Tensor:
        """Logits of these rows of the step, [B, V] in the model's dtype."""
        hidden_TC = self._run_decoder(inputs)
        if not rows:
            return hidden_TC.new_empty((0, self.decoder.config.vocab_size))
        if rows == list(range(len(rows))):  # all decode, and need no gathering
            return self.decoder.logits(hidden_TC[: len(rows)])
        self._sampled_rows.begin()[: len(rows)] = rows
        self._sampled_rows.send()
        return self.decoder.logits(hidden_TC.index_select(0, self._sampled_rows.tensor[: len(rows)]))
