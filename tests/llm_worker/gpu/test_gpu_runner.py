"""The GPU runner against the plain one; without a GPU kernels run in Triton's interpreter, and no graphs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.integration.test_parity import CASES
from tests.llm_worker.engine.harness import Request, input_buffer, request_for, request_state
from tests.llm_worker.engine.tensor_rows import TensorRows
from tests.llm_worker.gpu.interpreted import run_few_programs
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.runner import PlainRunner, Runner
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import Reference

pytest.importorskip("triton", reason="Triton is not installed")
from vitrine_vlm.gpu_kernels.graph_capture import Work
from vitrine_vlm.gpu_kernels.packed_attention import TorchSdpa, installed_attention
from vitrine_vlm.llm_worker.engine.capture_sizes import decode_capture_sizes, token_capture_sizes
from vitrine_vlm.llm_worker.gpu.gpu_runner import GpuRunner

# In float32, which the kernels for a GPU accept, too.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hidden_states(decoder: TextDecoder, requests: list[Request], gpu: bool) -> list[torch.Tensor]:
    """Steps as a scheduler makes them: a prompt in chunks, then beside another's, then tokens of both."""
    kv_cache = KvCache(decoder.config, 64, 16, DEVICE, torch.float32)
    buffer = input_buffer(decoder, 96)
    runner: Runner = PlainRunner(decoder, kv_cache, buffer)
    if gpu:
        # Short steps with up to 24 tokens: there are long ones, too.
        runner = GpuRunner(decoder, kv_cache, buffer, 4, 256, TorchSdpa(), capture=lambda work: work, max_short_step=24)
    sequences = []
    for request in requests:
        sequence = request_state(request.prompt, request.rows)
        sequence.token_ids += [5, 6, 7]
        kv_cache.append_slots(sequence.table, len(sequence.token_ids))
        sequences.append(sequence)
    one, other = sequences
    end, other_end = one.num_prompt_tokens, other.num_prompt_tokens
    cut = (one.prompt.spans[0].start) + 3
    steps = [
        [Chunk(one, 0, cut, False)],
        [Chunk(one, cut, end, True), Chunk(other, 0, 5, False)],
        [Chunk(one, end, end + 1, True), Chunk(other, 5, other_end, True)],
        [Chunk(one, end + 1, end + 2, True), Chunk(other, other_end, other_end + 1, True)],
        [Chunk(other, other_end + 1, other_end + 2, True)],
        [Chunk(one, end + 2, end + 3, True), Chunk(other, other_end + 2, other_end + 3, True)],
    ]
    found = []
    for chunks in steps:
        prepared = buffer.write(chunks)
        assert not prepared.failed
        found.append(runner(prepared.inputs).clone())
    return found


@torch.inference_mode()
def test_hidden_states_equal_the_PlainRunners(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        run_few_programs(monkeypatch)
    reference = Reference(checkpoint_folder)
    decoder = build_decoder(open_checkpoint(str(checkpoint_folder)), DEVICE, torch.float32)
    vision = reference.config.vision_config
    factor = vision.patch_size * vision.spatial_merge_size
    requests = [
        request_for(reference, CASES[name].text, CASES[name].media(factor)) for name in ("one_image", "text_only")
    ]
    plain = hidden_states(decoder, requests, gpu=False)
    for step, (ours, expected) in enumerate(zip(hidden_states(decoder, requests, gpu=True), plain, strict=True)):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4, msg=f"step {step}: {{}}".format)
    # Its weights lie elsewhere now, and are the same.
    for ours, expected in zip(hidden_states(decoder, requests, gpu=False), plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


@torch.inference_mode()
def test_steps_that_decode_let_the_next_one_be_prepared_at_once(
    qwen3_vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of prompts only wait for what arrives: long ones until their last layers, short ones until their end."""
    if DEVICE.type == "cpu":
        run_few_programs(monkeypatch)
    decoder = build_decoder(open_checkpoint(str(qwen3_vl_folder)), DEVICE, torch.float32)
    kv_cache, buffer = KvCache(decoder.config, 64, 16, DEVICE, torch.float32), input_buffer(decoder, 96)
    launched: list[str] = []

    class Noting(GpuRunner):
        def _event(self) -> None:
            launched.append("event")

    def noted(work: object) -> Work:
        return lambda: launched.append("work")

    runner = Noting(decoder, kv_cache, buffer, 4, 256, TorchSdpa(), capture=noted, max_short_step=24)
    one, other = (request_state(ExpandedPrompt([5] * 60, torch.arange(60).expand(3, -1), 60)) for _ in range(2))
    for each in (one, other):
        each.token_ids.append(6)
        kv_cache.append_slots(each.table, len(each.token_ids))
    token = Chunk(one, 60, 61, True)

    def launches(*chunks: Chunk) -> list[str]:
        launched.clear()
        runner(buffer.write(chunks).inputs)
        return list(launched)

    num_layers = decoder.config.num_hidden_layers
    assert launches(token) == ["event", "work"]
    assert launches(token, Chunk(other, 0, 8, False)) == ["event", "work"]
    assert launches(Chunk(other, 0, 8, False)) == ["work"]
    # The work of each layer is its attention of single tokens, and what lies between two attentions.
    assert launches(token, Chunk(other, 0, 40, False)) == ["event", *["work"] * (2 * num_layers + 1)]
    of_prompts = launches(Chunk(other, 0, 40, False))
    assert of_prompts.count("work") == num_layers + 1
    assert of_prompts.count("event") == 1 and (num_layers + 1) // 2 <= of_prompts.index("event") <= num_layers


@torch.inference_mode()
def test_a_long_past_is_cut_in_long_steps_as_in_decode_steps(qwen3_vl_folder: Path) -> None:
    """Few tokens must fill a GPU there, too: nothing else runs beside them."""
    decoder = build_decoder(open_checkpoint(str(qwen3_vl_folder)), DEVICE, torch.float32)
    kv_cache, buffer = KvCache(decoder.config, 128, 16, DEVICE, torch.float32), input_buffer(decoder, 96)
    runner = GpuRunner(
        decoder, kv_cache, buffer, 4, 2048, TorchSdpa(), capture=lambda _: lambda: None, max_short_step=24
    )
    long, other = (request_state(ExpandedPrompt([5] * n, torch.arange(n).expand(3, -1), n)) for n in (1600, 60))
    long.token_ids.append(6)
    for each in (long, other):
        kv_cache.append_slots(each.table, len(each.token_ids))

    def num_splits(*chunks: Chunk) -> int:
        runner(buffer.write(chunks).inputs)
        return int(runner._work.tables.singles.counts[1])

    token = Chunk(long, 1600, 1601, True)
    assert num_splits(token, Chunk(other, 0, 40, False)) == num_splits(token) == 1601 // 128


def test_capture_sizes() -> None:
    assert decode_capture_sizes(1) == [1]
    assert decode_capture_sizes(20) == [1, 2, 4, 8, 16, 20]
    sizes = token_capture_sizes(8192)
    assert (sizes[0], sizes[-1]) == (8, 8192)
    assert sizes == sorted(set(sizes))
    assert all(after <= before * 1.125 + 8 for before, after in pairwise(sizes))


MIN_COSINE = 0.9995
MARGIN = 0.05


@pytest.mark.gpu
@torch.inference_mode()
def test_graphs_equal_their_pieces_and_are_close_to_the_plain_decoder() -> None:
    """True widths, four layers, bfloat16; a long prompt in chunks beside others' tokens, then tokens of all."""
    from benchmarks.decoders import NUM_DEEPSTACK, qwen3_vl_8b_decoder

    device = torch.device("cuda")
    decoder = qwen3_vl_8b_decoder(device, num_layers=4)
    width = decoder.config.hidden_size * (1 + NUM_DEEPSTACK)
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn((600, width), device=device, generator=generator).bfloat16()

    def states(kind: str) -> list[torch.Tensor]:
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        model = decoder.to(dtype)
        kv_cache = KvCache(model.config, 512, 16, device, dtype)
        buffer = input_buffer(model, 1024)
        runner: Runner = PlainRunner(model, kv_cache, buffer)
        if kind in ("graphs", "pieces"):
            capture = None if kind == "graphs" else lambda work: work
            runner = GpuRunner(model, kv_cache, buffer, 20, 2048, installed_attention(torch.bfloat16), capture=capture)
        one = _request(kv_cache, 1, 900, MediaSpan(0, 100, 600, 0), TensorRows(rows.to(dtype)))
        others = [_request(kv_cache, 2 + each, 40 + each) for each in range(12)]
        steps = [
            [Chunk(other, 0, other.num_prompt_tokens, True) for other in others],
            [*(_token(other, 0) for other in others), Chunk(one, 0, 333, False)],
            [_token(other, 1) for other in others],
            [*(_token(other, 2) for other in others[:3]), Chunk(one, 333, 900, True)],
            [_token(each, 3 if each is not one else 0) for each in (one, *others[:3])],
            [_token(one, 1)],
        ]
        found = []
        for chunks in steps:
            prepared = buffer.write(chunks)
            assert not prepared.failed
            found.append(runner(prepared.inputs).clone())
        return found

    graphs, pieces, plain = states("graphs"), states("pieces"), states("plain")
    exact = states("float32")
    for step in range(len(exact)):
        assert torch.equal(graphs[step], pieces[step]), f"step {step}"
        ours, theirs = (
            torch.nn.functional.cosine_similarity(each[step].float(), exact[step], dim=-1) for each in (graphs, plain)
        )
        print(f"step {step}: cosine {ours.min():.6f}, plain bfloat16 {theirs.min():.6f}")
        assert ours.min() >= MIN_COSINE, f"step {step}"
        logits = decoder.lm_head(exact[step])
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > MARGIN
        same = decoder.lm_head(graphs[step].float()).argmax(-1) == logits.argmax(-1)
        assert same[clear].float().mean() > 0.97, f"step {step}"


def _request(
    kv_cache: KvCache, seed: int, num_tokens: int, span: MediaSpan | None = None, rows: TensorRows | None = None
) -> RequestState:
    token_ids = torch.randint(1000, 50000, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    positions = torch.arange(num_tokens).expand(3, -1)
    prompt = ExpandedPrompt(token_ids, positions, num_tokens, (span,) if span is not None else ())
    sequence = request_state(prompt, [rows] if rows is not None else [])
    sequence.token_ids += [5, 6, 7, 8]
    assert kv_cache.append_slots(sequence.table, len(sequence.token_ids))
    return sequence


def _token(sequence: RequestState, index: int) -> Chunk:
    start = sequence.num_prompt_tokens + index
    return Chunk(sequence, start, start + 1, True)
