"""Logits of every prompt position equal transformers', for every kind of prompt (fp32, small dims)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.test_parity import CASES
from tests.llm_worker.engine.harness import input_buffer, request_for, request_state
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import Reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk_size", [23, 1000])
@torch.inference_mode()
def test_logits_equal_transformers(checkpoint_folder: Path, chunk_size: int) -> None:
    reference = Reference(checkpoint_folder)
    decoder = build_decoder(open_checkpoint(str(checkpoint_folder)), CPU, torch.float32)
    vision = reference.config.vision_config
    for case in CASES.values():
        request = request_for(reference, case.text, case.media(vision.patch_size * vision.spatial_merge_size))
        expected_TV = reference.model(**request.inputs).logits[0]

        num_tokens = len(request.prompt.token_ids)
        kv_cache = KvCache(decoder.config, 64, 16, CPU, torch.float32)
        buffer = input_buffer(decoder, chunk_size)
        state = request_state(request.prompt, request.rows)
        kv_cache.append_slots(state.table, num_tokens)
        for start in range(0, num_tokens, chunk_size):
            stop = min(start + chunk_size, num_tokens)
            prepared = buffer.write([Chunk(state, start, stop, samples=False)])
            assert not prepared.failed
            logits_TV = decoder.logits(decoder(prepared.inputs, kv_cache.layers))
            assert (logits_TV - expected_TV[start:stop]).abs().max() <= 1e-3
