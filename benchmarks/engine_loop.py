"""Measures the engine's loop on the host: `python -m benchmarks.engine_loop` prints two lines and needs no GPU.

Requests decode on a decoder that computes nothing: what remains is Python, and small tensors on the CPU. Steps overlap
as on a GPU. Times are CPU time, which other processes affect least.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import torch

from vitrine_vlm.errors import InternalError
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, SamplingParams
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder


class _NoDecoder:
    """A `Runner` whose hidden states are constant, and whose steps can overlap at once."""

    def __init__(self, decoder: TextDecoder, kv_cache: KvCache, buffer: InputEmbedBuffer) -> None:
        self._hidden_MC = torch.zeros_like(buffer.embeds_MC)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        return self._hidden_MC[: len(inputs.slot_mapping_T)]

    def wait_until_nearly_done(self) -> bool:
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=128, help="requests at once; default: %(default)s")
    parser.add_argument("--num-tokens", type=int, default=256, help="tokens of each answer; default: %(default)s")
    parser.add_argument("--num-prompt-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = asyncio.run(_measure(options))
    for name, values in figures.items():
        print(f"{name}: {min(values):.1f} us a token at best, median {statistics.median(values):.1f}")
    return 0


async def _measure(options: argparse.Namespace) -> dict[str, list[float]]:
    num_requests = options.num_requests
    blocks = num_requests * (-(-(options.num_prompt_tokens + options.num_tokens) // 16) + 1)
    limits = EngineConfig(num_blocks=blocks, max_num_seqs=num_requests, max_num_batched_tokens=8192, prefix_cache=True)
    engine = Engine(ForwardPass(_decoder(), limits, _NoDecoder), limits)
    thread = threading.Thread(target=engine.run, name="engine")
    thread.start()
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    figures: dict[str, list[float]] = {"engine thread": [], "process": []}
    try:
        for _ in range(options.repeats):
            begin = time.clock_gettime(clock), time.process_time()
            await asyncio.gather(*(_one(engine, index, options) for index in range(num_requests)))
            end = time.clock_gettime(clock), time.process_time()
            for name, start, stop in zip(figures, begin, end, strict=True):
                figures[name].append((stop - start) / (num_requests * options.num_tokens) * 1e6)
    finally:
        engine.fail_all(InternalError("the benchmark is over"))
        thread.join()
    return figures


async def _one(engine: Engine, index: int, options: argparse.Namespace) -> None:
    num_tokens = options.num_prompt_tokens
    token_ids = [(index * 7 + place) % 60 for place in range(num_tokens)]
    prompt = ExpandedPrompt(token_ids, torch.arange(num_tokens).expand(3, -1), num_tokens)
    sampling = SamplingParams(temperature=0.0, max_tokens=options.num_tokens)
    handle = engine.submit(str(index), [], sampling, lambda items: None, prompt=prompt)
    try:
        async for _ in handle:
            pass
    finally:
        handle.cancel()


def _decoder() -> TextDecoder:
    """Returns a decoder whose logits cost little and are all zeros."""
    config = TextConfig(
        model_type="qwen3_vl",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(4, 2, 2),
        mrope_interleaved=True,
        qk_norm=True,
        qkv_bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        num_deepstack=0,
        moe=None,
    )
    with torch.device("meta"):
        decoder = TextDecoder(config)
    decoder = decoder.to_empty(device="cpu")
    for each in decoder.parameters():
        each.data.zero_()
    return decoder.eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
