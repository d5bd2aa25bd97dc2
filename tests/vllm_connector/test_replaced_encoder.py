"""An encoder is replaced by one of another checkpoint while vLLM runs, and comes back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from tests.encoder_service.running import run_encoder
from tests.vllm_connector.test_fetching import order, result_of, running_fetcher
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint
from vitrine_vlm.vllm_connector.fetching import RowFormat
from vitrine_vlm.vllm_connector.model_check import ServedModel
from vitrine_vlm.vllm_connector.worker_side import WorkerSide


async def test_an_encoder_of_another_checkpoint_is_left_out(
    qwen3_vl_folder: Path, tmp_path: Path, channel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows have the same form, and would be wrong."""
    listed = tmp_path / "encoders"
    other = save_random_checkpoint(tmp_path / "other", "qwen3_vl", seed=1)
    async with run_encoder(qwen3_vl_folder, tmp_path) as right:
        identity, settings = right.identity, right.preprocessor.settings
        served = ServedModel(
            identity.model_type,
            identity.out_hidden_size,
            identity.deepstack_visual_indexes,
            identity.dtype,
            settings.patch_size,
            settings.temporal_patch_size,
            settings.merge_size,
            identity.revision,
        )
        listed.write_text(right.address)
        side = WorkerSide(channel, 0, torch.device("cpu"))
        row_format = RowFormat("float32", identity.row_width)
        try:
            async with running_fetcher(f"file:{listed}", row_format, channel, tmp_path, 1, served.check) as fetcher:
                fetcher.fetch(order(1))
                assert (await result_of(fetcher)).error is None
                async with run_encoder(other, tmp_path) as wrong:
                    with caplog.at_level(logging.WARNING):
                        listed.write_text(wrong.address)
                        async with asyncio.timeout(20):
                            while "cannot serve this vLLM" not in caplog.text:
                                await asyncio.sleep(0.02)
                    assert wrong.identity.revision in caplog.text and identity.revision in caplog.text
                    fetcher.fetch(order(2))
                    assert isinstance((await result_of(fetcher)).error, EncoderUnavailable)
                    listed.write_text(right.address)
                    async with asyncio.timeout(20):
                        number = 3
                        while True:
                            fetcher.fetch(order(number))
                            if (await result_of(fetcher)).error is None:
                                break
                            number += 1
                            await asyncio.sleep(0.1)
                    assert not wrong.tower.batches
        finally:
            await asyncio.to_thread(side.close)
