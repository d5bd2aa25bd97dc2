"""Measures the worker's GPU path: `python -m benchmarks.llm` prints one Markdown table.

The decoder is Qwen3-VL-8B's with random weights in bfloat16. A time is that of a whole step as the engine runs it:
inputs to the GPU, landing, the decoder, logits, the next tokens back on the host. For decoding it is the time from one
step's tokens to the next step's: each step starts before the previous one has ended. The floor is the larger of two
times: that of the operations at 790 TFLOP/s, which a large bf16 product reaches on an H200, and twice that in FP8, and
that of reading weights and KV at 4.8 TB/s. With `--quantization` the same weights are measured in bfloat16 and in FP8,
with a scale a channel or a block, or with the KV cache in FP8, one after the other.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, TypeAlias

import torch

from benchmarks.decoders import NUM_DEEPSTACK, Scales, TransformersDecoder, qwen3_vl_8b_decoder
from benchmarks.exported_rows import exported_rows
from vitrine_vlm.embedding_transport.receiving.received_rows import copy_rows
from vitrine_vlm.gpu_kernels.packed_attention import installed_attention
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.config import EngineConfig, KvCacheDtype
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan, SamplingParams
from vitrine_vlm.llm_worker.engine.request_parts import SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.sampler import ChoiceOnHost, choose
from vitrine_vlm.llm_worker.gpu.gpu_runner import GpuRunner
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.fp8_linear import Fp8Linear
from vitrine_vlm.types import ItemTimings

# Scales of weights in FP8, or the KV cache in FP8 beside weights in bfloat16.
Quantization: TypeAlias = Scales | Literal["kv_cache"]

_CEILING_FLOP_PER_S, _CEILING_BYTES_PER_S = 790e12, 4.8e12
_PROMPTS = (128, 512, 2048, 8192)
_BATCHES, _CONTEXT = (1, 32, 128), 1024
_MAX_TOKENS, _MAX_NUM_SEQS, _BLOCK_SIZE = 8192, 128, 16
_TEXT_TOKENS, _MEDIA_TOKENS = 6, 324  # 560x560
_HIDDEN_OF = (1, 32, 512)  # tokens whose hidden states are compared
_LANDED_TOKENS = 2040  # 1920x1080
_WARM_UPS, _REPEATS, _SLOW_REPEATS, _DECODE_STEPS = 3, 20, 5, 50


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36, help="layers of the decoder; default: %(default)s")
    parser.add_argument(
        "--quantization", nargs="+", choices=["channel", "block", "kv_cache"], default=[], help="measure FP8, too"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if options.quantization:
        return _compare_fp8(options.layers, options.quantization)
    with torch.inference_mode():
        rows = list(_rows(options.layers))
    print("\n| figure | ours, ms | floor, ms | compared with | its ms | times faster |")
    print("\n".join(["|---|---|---|---|---|---|", *rows]))
    return 0


def _rows(num_layers: int) -> list[str]:
    worker = _Worker(num_layers)
    reference = TransformersDecoder(worker.decoder)
    rows = [_prefill_row(worker, reference, num_tokens) for num_tokens in _PROMPTS]
    rows += [_decode_row(worker, reference, batch) for batch in _BATCHES]
    rows.append(_graphs_row(worker))
    rows += [_landing_row(worker, gpu) for gpu in range(min(2, torch.cuda.device_count()))]
    return rows


@torch.inference_mode()
def _compare_fp8(num_layers: int, quantizations: Sequence[Quantization]) -> int:
    """Measures the same steps in bfloat16 and in FP8, and how far hidden states are from each other."""
    worker = _Worker(num_layers)
    expected = {num_tokens: _hidden_states(worker, num_tokens) for num_tokens in _HIDDEN_OF}
    figures = _figures_of_steps(worker)
    columns = [[f"{ms:.2f} ({floor_ms:.2f})" for ms, floor_ms in figures.values()]]
    for each in quantizations:
        del worker
        gc.collect()
        torch.cuda.empty_cache()
        worker = _Worker(num_layers, each)
        found = _figures_of_steps(worker)
        pairs = zip(found.values(), figures.values(), strict=True)
        columns.append([f"{ms:.2f} ({floor:.2f}), {bf16_ms / ms:.2f}" for (ms, floor), (bf16_ms, _) in pairs])
        for num_tokens, hidden_TC in expected.items():
            cosine = torch.nn.functional.cosine_similarity(_hidden_states(worker, num_tokens), hidden_TC, dim=-1)
            print(f"{each}, {num_tokens} tokens: cosine to bfloat16 {cosine.min():.5f}, mean {cosine.mean():.5f}")
    print(f"\n| step | bfloat16, ms (floor) | {' | '.join(f'FP8, {each}, times faster' for each in quantizations)} |")
    print("|---" * (2 + len(quantizations)) + "|")
    for name, *cells in zip(figures, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


def _figures_of_steps(worker: _Worker) -> dict[str, tuple[float, float]]:
    """Time and floor of each kind of step, ms."""
    figures = {}
    for batch in _BATCHES:
        requests = [worker.decoding(_CONTEXT) for _ in range(batch)]
        ms = worker.decode_ms(requests, _DECODE_STEPS)
        worker.release(requests)
        figures[f"decode of {batch}, {_CONTEXT} tokens of context"] = (
            ms,
            _floor_ms(worker.decoder, [1] * batch, [_CONTEXT] * batch, worker.kv_itemsize),
        )
    for num_tokens in _PROMPTS:
        request = worker.prompt(num_tokens)
        chunks = [Chunk(request, 0, num_tokens, True)]
        ms = _median_ms(partial(worker.step, chunks, worker.graphed), _REPEATS)
        worker.release([request])
        floor_ms = _floor_ms(worker.decoder, [num_tokens], [0], worker.kv_itemsize)
        figures[f"prefill of {num_tokens} tokens"] = (ms, floor_ms)
    return figures


def _hidden_states(worker: _Worker, num_tokens: int) -> torch.Tensor:
    """Hidden states of a seeded prompt, [T, C] float32."""
    torch.manual_seed(num_tokens)
    request = worker.prompt(num_tokens)
    prepared = worker.graphed.buffer.write([Chunk(request, 0, num_tokens, True)])
    hidden_TC = worker.graphed._run_decoder(prepared.inputs).float().clone()
    worker.release([request])
    return hidden_TC


class _Worker:
    """The parts of the engine that run a step."""

    def __init__(self, num_layers: int, quantization: Quantization | None = None) -> None:
        fp8_scales = None if quantization == "kv_cache" else quantization
        self.decoder = qwen3_vl_8b_decoder(torch.device("cuda"), num_layers, fp8_scales)
        self._kv_cache_dtype: KvCacheDtype = "fp8" if quantization == "kv_cache" else "auto"
        self.graphed = self._forward_pass(graphs=True)
        self._kv_cache = self.graphed.kv_cache
        for layer in self._kv_cache.layers:
            layer.copy_(torch.randn_like(layer, dtype=torch.bfloat16))

    @property
    def kv_itemsize(self) -> int:
        return self._kv_cache.layers.dtype.itemsize

    def without_graphs(self) -> ForwardPass:
        """Returns a forward pass without CUDA graphs over the same KV cache."""
        forward_pass = self._forward_pass(graphs=False)
        forward_pass.kv_cache.layers.copy_(self._kv_cache.layers)
        return forward_pass

    def _forward_pass(self, *, graphs: bool) -> ForwardPass:
        config = EngineConfig(
            max_num_batched_tokens=_MAX_TOKENS,
            max_num_seqs=_MAX_NUM_SEQS,
            block_size=_BLOCK_SIZE,
            num_blocks=_MAX_NUM_SEQS * (_CONTEXT // _BLOCK_SIZE + 1),
            kv_cache_dtype=self._kv_cache_dtype,
        )
        make_runner = partial(
            GpuRunner,
            max_num_seqs=_MAX_NUM_SEQS,
            max_model_len=_MAX_TOKENS,
            causal=installed_attention(torch.bfloat16),
            capture=None if graphs else lambda work: work,
        )
        return ForwardPass(self.decoder, config, make_runner)

    def prompt(self, num_tokens: int, spans: tuple[MediaSpan, ...] = ()) -> RequestState:
        """Returns a request with nothing computed yet, and KV blocks for one more token."""
        token_ids = torch.randint(1000, 100000, (num_tokens,)).tolist()
        greedy = SamplingParams(temperature=0.0)
        row = self.graphed.token_pool.allocate()
        request = RequestState(0, "benchmark", [], SampledTokens(greedy), pool_row=row)
        request.set_prompt(ExpandedPrompt(token_ids, torch.arange(num_tokens).expand(3, -1), num_tokens, spans))
        assert self._kv_cache.append_slots(request.table, num_tokens + 1)
        return request

    def decoding(self, num_tokens: int) -> RequestState:
        """Returns a request with `num_tokens` tokens computed, and one more to run."""
        request = self.prompt(num_tokens)
        request.num_computed = num_tokens
        request.token_ids.append(1000)
        return request

    def release(self, requests: Sequence[RequestState]) -> None:
        for request in requests:
            self._kv_cache.release(request.table)
            self.graphed.token_pool.release(request.pool_row)

    def step(self, chunks: list[Chunk], forward_pass: ForwardPass) -> list[int | None]:
        """Runs a step as the engine does; returns the next tokens."""
        return [each.token_id for each in self._launch(chunks, forward_pass).read()]

    def decode_ms(self, requests: Sequence[RequestState], num_steps: int) -> float:
        """Returns the median time from one step's tokens to the next step's."""
        chunks = [Chunk(request, request.num_computed, request.num_computed + 1, True) for request in requests]
        in_flight = self._launch(chunks, self.graphed)
        for request in requests:  # their tokens are read from the token pool from now on
            request.token_ids.pop()
            request.sampled.num_in_flight = 1
        times = [time.perf_counter()]
        for _ in range(num_steps):
            following = self._launch(chunks, self.graphed)
            in_flight.read()
            times.append(time.perf_counter())
            in_flight = following
        in_flight.read()
        return statistics.median(end - begin for begin, end in pairwise(times)) * 1e3

    def _launch(self, chunks: list[Chunk], forward_pass: ForwardPass) -> ChoiceOnHost:
        output = forward_pass(chunks)
        assert not output.failed, output.failed
        choice = choose(output.logits_BV, [chunk.request.sampled.params for chunk in chunks], [0.0] * len(chunks))
        forward_pass.token_pool.write(output.pool_rows_B, choice.token_ids_B)
        return choice.copy_to_host()


def _prefill_row(worker: _Worker, reference: TransformersDecoder, num_tokens: int) -> str:
    request = worker.prompt(num_tokens)
    chunks = [Chunk(request, 0, num_tokens, True)]
    ms = _median_ms(lambda: worker.step(chunks, worker.graphed), _REPEATS)
    worker.release([request])
    token_ids_BT = torch.randint(1000, 100000, (1, num_tokens), device="cuda")
    positions_3BT = torch.arange(num_tokens, device="cuda").expand(3, 1, -1)
    its_ms = _median_ms(
        lambda: reference(token_ids_BT, positions_3BT, reference.filled_cache(1, 0)).argmax(-1).tolist(), _SLOW_REPEATS
    )
    return _figures(f"prefill of {num_tokens} tokens", ms, _floor_ms(worker.decoder, [num_tokens], [0]), its_ms)


def _decode_row(worker: _Worker, reference: TransformersDecoder, batch: int) -> str:
    requests = [worker.decoding(_CONTEXT) for _ in range(batch)]
    ms = worker.decode_ms(requests, _DECODE_STEPS)
    worker.release(requests)
    cache = reference.filled_cache(batch, _CONTEXT)
    token_ids_BT = torch.randint(1000, 100000, (batch, 1), device="cuda")
    positions_3BT = torch.full((3, batch, 1), _CONTEXT, device="cuda")

    def decode() -> None:
        reference(token_ids_BT, positions_3BT, cache).argmax(-1).tolist()
        cache.crop(-1)

    its_ms = _median_ms(decode, _SLOW_REPEATS)
    floor_ms = _floor_ms(worker.decoder, [1] * batch, [_CONTEXT] * batch)
    return _figures(f"decode of {batch}, {_CONTEXT} tokens of context", ms, floor_ms, its_ms)


def _graphs_row(worker: _Worker) -> str:
    """Measures a prompt with a picture, with and without CUDA graphs."""
    num_tokens = _TEXT_TOKENS + _MEDIA_TOKENS
    spans = (MediaSpan(0, _TEXT_TOKENS // 2, _MEDIA_TOKENS, 0),)
    request = worker.prompt(num_tokens, spans)
    width = worker.decoder.config.hidden_size * (1 + NUM_DEEPSTACK)
    embeddings = _TensorRows(torch.randn((_MEDIA_TOKENS, width), device="cuda", dtype=torch.bfloat16))
    request.receive_embeddings(0, embeddings)
    chunks = [Chunk(request, 0, num_tokens, True)]
    plain = worker.without_graphs()
    ms = _median_ms(lambda: worker.step(chunks, worker.graphed), _REPEATS)
    its_ms = _median_ms(lambda: worker.step(chunks, plain), _REPEATS)
    worker.release([request])
    floor_ms = _floor_ms(worker.decoder, [num_tokens], [0])
    return _figures(f"prefill of {num_tokens} tokens with a picture", ms, floor_ms, its_ms, "the same without graphs")


def _landing_row(worker: _Worker, gpu: int) -> str:
    """Measures landing from another process's pool, and the check of the lease at the end of the step."""
    buffer = worker.graphed.buffer
    where = "another GPU" if gpu else "this GPU"
    with exported_rows(gpu, _LANDED_TOKENS, worker.decoder.config.hidden_size * (1 + NUM_DEEPSTACK)) as rows:

        def land() -> None:
            rows.copy_to(buffer.embeds_MC[:_LANDED_TOKENS], buffer.deepstack_NMC[:, :_LANDED_TOKENS], 0)
            torch.cuda.synchronize()

        ms, check_ms = _median_ms(land, _REPEATS), _median_ms(rows.check, _REPEATS)
        gb = rows.rows_TW.nbytes / 1e9
        assert torch.equal(buffer.embeds_MC[:_LANDED_TOKENS], rows.rows_TW[:, : buffer.embeds_MC.shape[1]].to("cuda"))
    what = f"landing of {_LANDED_TOKENS} tokens from {where}, {gb / ms * 1e3:.0f} GB/s"
    return f"| {what}; its check {check_ms:.3f} ms | {ms:.3f} | | | | |"


@dataclass(eq=False)
class _TensorRows:
    """Rows in a tensor of this process."""

    rows_TW: torch.Tensor

    def __post_init__(self) -> None:
        self.num_tokens = len(self.rows_TW)
        self.timings = ItemTimings()

    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        copy_rows(self.rows_TW, main_TD, deepstack_NTD, first_row)

    def queue_check(self) -> Callable[[], None]:
        return self.check

    def check(self) -> None:
        pass

    def release(self) -> None:
        pass


def _floor_ms(decoder: TextDecoder, num_new: list[int], num_past: list[int], kv_itemsize: int = 2) -> float:
    """Returns the floor for sequences with these numbers of new tokens and of tokens with KV; one logits row each."""
    config = decoder.config
    weights = [each for name, each in decoder.layers.named_parameters() if name.endswith("_proj.weight")]
    layer_weights = sum(each.numel() for each in weights)
    head_weights = decoder.lm_head.weight.numel()
    queries = config.num_attention_heads * config.head_dim
    pairs = sum(new * past + new * (new + 1) / 2 for new, past in zip(num_new, num_past, strict=True))
    in_fp8 = any(isinstance(each, Fp8Linear) for each in decoder.modules())
    # Tensor cores multiply twice as fast in FP8.
    operations: float = 2 * layer_weights * sum(num_new) / (2 if in_fp8 else 1) + 2 * head_weights * len(num_new)
    operations += 4 * pairs * queries * config.num_hidden_layers
    kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kv_nbytes = kv_itemsize * kv_elements * (sum(num_new) + sum(num_past))
    nbytes = sum(each.nbytes for each in weights) + 2 * head_weights + kv_nbytes
    return max(operations / _CEILING_FLOP_PER_S, nbytes / _CEILING_BYTES_PER_S) * 1e3


def _figures(name: str, ms: float, floor_ms: float, its_ms: float, other: str = "transformers") -> str:
    return f"| {name} | {ms:.2f} | {floor_ms:.2f} | {other} | {its_ms:.1f} | {its_ms / ms:.2f} |"


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    """Returns the median wall-clock time; `work` must end with its result on the host."""
    for _ in range(_WARM_UPS):
        work()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
