"""The model side of a step: tokens and media rows into the buffers, through the decoder, logits out.

Shapes: B rows to sample from, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from llm_worker.engine.config import EngineConfig
from llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from llm_worker.engine.kv_cache import KvCache
from llm_worker.engine.runner import MakeRunner, PlainRunner
from llm_worker.engine.scheduler import Chunk
from llm_worker.engine.staging_buffer import PinnedStagingBuffer
from llm_worker.models.decoder import StepInputs, TextDecoder


@dataclass(frozen=True)
class StepOutput:
    """Of a step that has started; a GPU may still be computing it.

    logits_BV: in the model's dtype, one row for each chunk of `sampling`.
    landed: checks of the media rows in the step, by chunk, to be called when it is computed.
    failed: chunks whose media rows could not be landed, with the reason: what is computed for them does not count.
    """

    sampling: list[Chunk]
    logits_BV: torch.Tensor
    landed: dict[Chunk, list[Callable[[], None]]]
    failed: dict[Chunk, Exception]


class ForwardPass:
    """A decoder, or one rank's part of it, with its KV cache and input buffers. Not thread-safe: one step at a time.

    only_starts: a step is computed while its logits are on their way back already, as on a GPU.
    passes_tokens_on: a step can take tokens that the one in front chooses before they are known here.
    """

    passes_tokens_on = True

    def __init__(self, decoder: TextDecoder, config: EngineConfig, make_runner: MakeRunner = PlainRunner) -> None:
        """
        Args:
            make_runner: what runs the decoder over buffers and cache.
        """
        self.decoder = decoder
        self.only_starts = decoder.device.type == "cuda"
        self.kv_cache = KvCache(decoder.config, config.num_blocks, config.block_size, decoder.device, decoder.dtype)
        self.buffer = InputEmbedBuffer(decoder, config.max_num_batched_tokens)
        self._sampled_rows = PinnedStagingBuffer((config.max_num_seqs,), torch.int64, decoder.device)
        self._run_decoder = make_runner(decoder, self.kv_cache, self.buffer)

    def __call__(self, chunks: Many[Chunk], chosen_B: torch.Tensor | None = None) -> StepOutput:
        """Starts a step of these chunks; their KV is in the cache afterwards.

        Args:
            chosen_B: what the step in front chooses, on the device, if that is not through; see `Sequence.token_ids`.
        """
        inputs, failed = self.buffer.write(chunks, chosen_B)
        last_rows = {
            chunk: slice_.start + slice_.length - 1
            for chunk, slice_ in zip(chunks, inputs.sequences, strict=True)
            if chunk.samples and chunk not in failed
        }
        logits_BV = self.run(inputs, list(last_rows.values()))
        # A video has many landings.
        landed = {
            chunk: [rows.queue_check() for rows in {id(each.rows): each.rows for each in landings}.values()]
            for chunk, landings in self.buffer.landed.items()
        }
        self.buffer.landed = {}  # or it would hold on to encoders' memory until the next step
        return StepOutput(list(last_rows), logits_BV, landed, failed)

    def run(self, inputs: StepInputs, rows: list[int]) -> torch.Tensor:
        """Logits of these rows of the step, [B, V] in the model's dtype."""
        all_decode = rows == list(range(len(rows)))  # and need no gathering
        if not all_decode:
            self._sampled_rows.writable()[: len(rows)] = rows
            self._sampled_rows.copy_to_device()
        hidden_TC = self._run_decoder(inputs)
        if not rows:
            return hidden_TC.new_empty((0, self.decoder.config.vocab_size))
        if not all_decode:
            hidden_TC = hidden_TC.index_select(0, self._sampled_rows.tensor[: len(rows)])
        return self.decoder.logits(hidden_TC[: len(rows)])

    def until_nearly_done(self) -> bool:
        """See `Runner.until_nearly_done`."""
        return self._run_decoder.until_nearly_done()
