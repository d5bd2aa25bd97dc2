"""Measures decoding under a JSON schema beside free decoding: `python -m benchmarks.constrained` prints a table.

The whole engine runs, with Qwen3-VL-8B's decoder and random weights in bfloat16. All streams decode at once, greedily;
a time is that of a token of all of them. Free and constrained streams take turns. The vocabulary is made of the bytes
and of random words, as many as the model has logits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from benchmarks.decoders import qwen3_vl_8b_decoder
from vitrine_vlm.gpu_kernels.packed_attention import installed_attention
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.grammar import JsonGrammar
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, SamplingParams
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.llm_worker.gpu.gpu_runner import GpuRunner
from vitrine_vlm.service_runtime.supervisor import Supervisor

_PROMPT_TOKENS, _WARM_UP_TOKENS = 64, 16
# Long enough that no answer ends before its last token.
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_SCHEMA = json.dumps({"type": "array", "items": _PERSON, "minItems": 1000})


class _Words:
    """A vocabulary of the bytes, an end token, and random words."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)

    def __init__(self, vocab_size: int) -> None:
        random_, words = random.Random(0), dict[bytes, None]()
        while len(words) < vocab_size - 257:
            words["".join(random_.choices('abcdefghijklmnop ,:"', k=random_.randint(2, 9))).encode()] = None
        self.tokens = [*(bytes([each]) for each in range(256)), b"", *words]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 32, 128], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=36, help="layers of the decoder; default: %(default)s")
    parser.add_argument("--num-tokens", type=int, default=256, help="tokens of each answer; default: %(default)s")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    options = parser.parse_args(arguments)
    print("| streams | free, ms a token | under a schema, ms a token | ratio |\n|---|---|---|---|")
    asyncio.run(_measure(options))
    return 0


async def _measure(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    decoder = qwen3_vl_8b_decoder(device, options.layers)
    most = max(options.streams)
    config = EngineConfig(
        num_blocks=most * (-(-(_PROMPT_TOKENS + options.num_tokens) // 16) + 1),
        max_num_seqs=most,
        max_num_batched_tokens=8192,
        max_model_len=4096,
    )
    make_runner: MakeRunner = PlainRunner
    if device.type == "cuda":
        causal = installed_attention(torch.bfloat16)
        make_runner = partial(GpuRunner, max_num_seqs=most, max_model_len=4096, causal=causal)
    engine = Engine(ForwardPass(decoder, config, make_runner), config)
    engine.start(Supervisor())
    words = TokenizerWrapper(_Words(engine.vocab_size))
    tokenizer = LLTokenizer(words, n_vocab=engine.vocab_size)
    compiled = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(_SCHEMA))
    try:
        for num_streams in options.streams:
            free, constrained = [], []
            for _ in range(options.repeats):
                free.append(await _ms_a_token(engine, [None] * num_streams, options.num_tokens))
                matchers = [GrammarMatcher(compiled.deep_copy(), tokenizer) for _ in range(num_streams)]
                constrained.append(await _ms_a_token(engine, matchers, options.num_tokens))
            ours, theirs = statistics.median(constrained), statistics.median(free)
            print(f"| {num_streams} | {theirs:.3f} | {ours:.3f} | {ours / theirs:.3f} |", flush=True)
    finally:
        await asyncio.to_thread(engine.close)


async def _ms_a_token(engine: Engine, matchers: Sequence[GrammarMatcher | None], num_tokens: int) -> float:
    """The time of a token of all streams, from the one at which all are decoding."""
    times = await asyncio.gather(
        *(_token_times(engine, index, each, num_tokens) for index, each in enumerate(matchers))
    )
    begin, end = max(each[_WARM_UP_TOKENS] for each in times), min(each[-1] for each in times)
    num_steps = min(sum(begin < time_ <= end for time_ in each) for each in times)
    return (end - begin) / num_steps * 1e3


async def _token_times(engine: Engine, index: int, matcher: GrammarMatcher | None, num_tokens: int) -> list[float]:
    token_ids = [1000 + (index * 7 + place) % 60 for place in range(_PROMPT_TOKENS)]
    prompt = ExpandedPrompt(token_ids, torch.arange(_PROMPT_TOKENS).expand(3, -1), _PROMPT_TOKENS)
    grammar = JsonGrammar(_SCHEMA) if matcher is not None else None
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, grammar=grammar)
    handle = engine.submit(str(index), [], sampling, lambda items: None, prompt=prompt, matcher=matcher)
    times = []
    async for _ in handle:
        times.append(time.perf_counter())
    handle.cancel()
    assert len(times) == num_tokens
    return times


if __name__ == "__main__":
    sys.exit(main())
