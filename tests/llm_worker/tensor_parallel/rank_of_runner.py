"""One rank of test_runner.py: `python -m tests.llm_worker.tensor_parallel.rank_of_runner RANK STORE FOLDER OUT`.

Rank 0 writes the hidden states of every step, as each kind of runner computes them, to OUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.llm_worker.engine.harness import input_buffer, request_state
from tests.llm_worker.engine.tensor_rows import TensorRows
from tests.llm_worker.gpu.interpreted import run_few_programs
from vitrine_vlm.gpu_kernels.packed_attention import TorchSdpa
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.runner import PlainRunner, Runner
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.gpu.gpu_runner import GpuRunner
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.tensor_parallel.group import TorchGroup
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

SPAN = MediaSpan(0, 2, 12, 0)


def hidden_states(decoder: TextDecoder, kind: str) -> list[torch.Tensor]:
    """Results of a prompt with a picture in two chunks, a short one beside it, and tokens of both."""
    kv_cache = KvCache(decoder.config, 16, 16, decoder.device, torch.float32)
    buffer = input_buffer(decoder, 24)
    runner: Runner = PlainRunner(decoder, kv_cache, buffer)
    if kind != "plain":
        capture = None if kind == "graphs" else lambda work: work
        # There are short steps and, above 8 tokens, long ones.
        runner = GpuRunner(decoder, kv_cache, buffer, 2, 64, TorchSdpa(), capture=capture, max_short_step=8)
    width = decoder.config.hidden_size * (1 + decoder.config.num_deepstack)
    rows_TW = torch.randn((SPAN.length, width), generator=torch.Generator().manual_seed(0))
    one, other = _sequence(kv_cache, 24, SPAN), _sequence(kv_cache, 3)
    one.receive_embeddings(0, TensorRows(rows_TW.to(decoder.device)))
    steps = [
        [Chunk(one, 0, 6, False)],
        [Chunk(one, 6, 24, True), Chunk(other, 0, 3, True)],
        [Chunk(one, 24, 25, True), Chunk(other, 3, 4, True)],
    ]
    found = []
    for chunks in steps:
        prepared = buffer.write(chunks)
        assert not prepared.failed
        found.append(runner(prepared.inputs).clone())
    return found


def _sequence(kv_cache: KvCache, num_tokens: int, *spans: MediaSpan) -> RequestState:
    token_ids = [30 + index % 90 for index in range(num_tokens)]
    sequence = request_state(ExpandedPrompt(token_ids, torch.arange(num_tokens).expand(3, -1), num_tokens, spans))
    sequence.token_ids += [50, 60]
    assert kv_cache.append_slots(sequence.table, len(sequence.token_ids))
    return sequence


@torch.inference_mode()
def main() -> None:
    rank, store, folder, out = sys.argv[1:]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(rank))
        torch.cuda.set_device(device)
    else:
        run_few_programs(pytest.MonkeyPatch())
    group = TorchGroup.join(int(rank), 2, device, Path(store))
    found = {}
    for kind in ("plain", "pieces", "graphs") if device.type == "cuda" else ("plain", "pieces"):
        decoder = build_decoder(open_checkpoint(folder), device, torch.float32, group=group)
        for step, hidden_TC in enumerate(hidden_states(decoder, kind)):
            found[f"{kind} {step}"] = hidden_TC.cpu()
    if rank == "0":
        save_file(found, out)


if __name__ == "__main__":
    main()
    os._exit(0)
