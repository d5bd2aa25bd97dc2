"""The model's part of a step: tokens and media embeddings are written to the buffers, the decoder computes logits.

Shapes: B sampled tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer, PreparedStep
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.kv_memory import kv_dtype
from vitrine_vlm.llm_worker.engine.prompt_logprobs import LogprobTensors, prompt_logprobs, scored_tokens
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool
from vitrine_vlm.llm_worker.models.decoder import TextDecoder


@dataclass(frozen=True)
class StepOutput:
    """The results of a step in flight; a GPU may still be computing it.

    sampling: the chunks that end at their request's last token, those of `failed` included.
    logits_BV: in the model's dtype, one row for each chunk of `sampling`.
    pool_rows_B: the token pool's rows of their requests, on the device; valid until the next step.
    prompt_logprobs: by chunk, see `prompt_logprobs.py`.
    landed: checks of the media embeddings in the step, by chunk, to be called when the step is computed.
    failed: see PreparedStep.
    """

    sampling: list[Chunk]
    logits_BV: torch.Tensor
    pool_rows_B: torch.Tensor
    prompt_logprobs: dict[Chunk, LogprobTensors]
    landed: dict[Chunk, list[Callable[[], None]]]
    failed: dict[Chunk, Exception]


class ForwardPass:
    """A decoder, or one rank's part of it, with its KV cache and input buffers. Not thread-safe: one step at a time.

    is_asynchronous: a step is computed while the host goes on, as on a GPU.
    reads_token_pool: a step can read tokens that a step in flight samples, before the host knows them.
    """

    reads_token_pool = True

    def __init__(self, decoder: TextDecoder, config: EngineConfig, make_runner: MakeRunner = PlainRunner) -> None:
        """
        Args:
            make_runner: makes the runner, which runs the decoder over buffers and cache.

        Raises:
            CheckpointError: see `kv_dtype`.
        """
        self.decoder = decoder
        self.is_asynchronous = decoder.device.type == "cuda"
        dtype = kv_dtype(decoder, config.kv_cache_dtype)
        self.kv_cache = KvCache(decoder.config, config.num_blocks, config.block_size, decoder.device, dtype)
        self.token_pool = TokenPool(config.max_num_seqs + config.max_waiting, decoder.device)
        self.buffer = InputEmbedBuffer(decoder, config.max_num_batched_tokens, config.max_num_seqs, self.token_pool)
        self._run_decoder = make_runner(decoder, self.kv_cache, self.buffer)

    def __call__(self, chunks: Sequence[Chunk]) -> StepOutput:
        """Launches a step of these chunks, which writes their KV into the cache."""
        scored = scored_tokens(chunks)
        prepared = self.buffer.write(chunks, scored.values())
        logits_BV, logprobs = self.run(prepared)
        # One check for each item: a video has many landings.
        landed = {
            chunk: [each.queue_check() for each in {id(each.embeddings): each.embeddings for each in landings}.values()]
            for chunk, landings in prepared.landings.items()
        }
        sampling = [chunk for chunk in chunks if chunk.samples]
        pool_rows_B = self.buffer.sampled_pool_rows_S[: len(sampling)]
        of_prompts = dict(zip(scored, logprobs, strict=True))
        return StepOutput(sampling, logits_BV, pool_rows_B, of_prompts, landed, prepared.failed)

    def run(self, prepared: PreparedStep) -> tuple[torch.Tensor, list[LogprobTensors]]:
        """Logits of the step's sampled tokens, [B, V] in the model's dtype, and what `scored` asks for."""
        hidden_TC, sampled = self._run_decoder(prepared.inputs), prepared.sampled_tokens
        logprobs = [prompt_logprobs(hidden_TC, each, self.decoder.logits) for each in prepared.scored]
        if not sampled:
            return hidden_TC.new_empty((0, self.decoder.config.vocab_size)), logprobs
        if sampled != list(range(len(sampled))):  # where all decode there is nothing to gather
            hidden_TC = hidden_TC.index_select(0, self.buffer.sampled_tokens_S[: len(sampled)])
        return self.decoder.logits(hidden_TC[: len(sampled)]), logprobs

    def wait_until_nearly_done(self) -> bool:
        """See `Runner.wait_until_nearly_done`."""
        return self._run_decoder.wait_until_nearly_done()
