"""The checkpoint that figures are measured with has the published model's dims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.checkpoints import save_qwen3_vl_8b
from vitrine_vlm.encoder_service.families import family_of, processor_settings
from vitrine_vlm.llm_worker.families import prompt_config, text_config
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.weights import stored_dtype
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint


def num_parameters(*models: nn.Module) -> int:
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def test_qwen3_vl_8b(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_qwen3_vl_8b(tmp_path)), load_format="dummy")
    text = text_config(checkpoint)
    assert (text.rope_theta, text.mrope_section, text.mrope_interleaved) == (5e6, (24, 20, 20), True)
    assert (text.num_deepstack, text.tie_word_embeddings, text.max_position_embeddings) == (3, False, 262144)
    assert stored_dtype(checkpoint) == torch.bfloat16
    with torch.device("meta"):
        decoder, tower = TextDecoder(text), family_of(checkpoint).build(checkpoint.config)
    # The hub counts 8.77e9 for Qwen/Qwen3-VL-8B-Instruct.
    assert num_parameters(decoder, tower) == pytest.approx(8.77e9, rel=1e-3)
    assert processor_settings(checkpoint).max_pixels > 1920 * 1080

    tokenizer, prompt = PromptTokenizer(checkpoint), prompt_config(checkpoint)
    assert prompt.image_token_id in tokenizer.encode("<|vision_start|><|image_pad|><|vision_end|>")
    # Whatever token comes out, it has a text: clients see each come.
    assert all(tokenizer.detokenizer().push(token_id) for token_id in (65, 300, text.vocab_size - 1))
