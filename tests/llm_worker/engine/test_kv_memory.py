"""The KV cache takes the memory that is left, and its dtype decides how many tokens that is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitrine_vlm.llm_worker.engine.kv_memory import kv_dtype, kv_tokens_that_fit
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint

GIB = 1 << 30


@pytest.fixture
def decoder(qwen3_vl_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TextDecoder:
    """In bfloat16, on a device of 8 GiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * GIB))
    with torch.device("meta"):
        return TextDecoder(text_config(open_checkpoint(str(qwen3_vl_folder)))).bfloat16()


def test_twice_the_tokens_fit_in_fp8(decoder: TextDecoder) -> None:
    plain, fp8 = (kv_tokens_that_fit(decoder, each, 2048, 0.9, GIB) for each in ("auto", "fp8"))
    assert plain > 1000
    assert fp8 // 2 == plain


def test_no_memory_left_is_an_error(decoder: TextDecoder) -> None:
    with pytest.raises(CheckpointError, match="--max-num-batched-tokens"):
        kv_tokens_that_fit(decoder, "fp8", 2048, 0.9, 8 * GIB)


def test_dtypes(decoder: TextDecoder) -> None:
    assert (kv_dtype(decoder, "auto"), kv_dtype(decoder, "fp8")) == (torch.bfloat16, torch.float8_e4m3fn)


def test_a_gpu_without_fp8_is_refused(decoder: TextDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(TextDecoder, "device", torch.device("cuda"))
    with pytest.raises(CheckpointError, match=r"8\.9 or more, this one has 8\.6"):
        kv_dtype(decoder, "fp8")
