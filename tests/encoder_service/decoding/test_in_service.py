"""An encoder whose media are decoded in processes: what a client that leaves, or sends a hostile file, costs others."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.encoder_service.decoding import hostile
from tests.encoder_service.running import image, png, run_encoder
from tests.encoder_service.test_service import ItemFailed, RecordedReplies
from vitrine_vlm.encoder_service.decoding.decoder_pool import DecoderPool
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.errors import MediaTooLarge
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import LayoutEvent


async def test_a_call_that_is_cancelled_and_one_that_takes_too_long(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    supervisor = Supervisor()
    decoders = DecoderPool(
        2,
        max_pixels=MediaLimits().max_pixels,
        image_timeout_s=0.1,
        video_timeout_s=0.1,
        max_decoded_nbytes=1 << 30,
    )
    decoders.start(supervisor)
    slow = image(hostile.scans(3200, 3200, 100))
    async with run_encoder(qwen3_vl_folder, tmp_path, decoders=decoders) as encoder:
        replies, left = RecordedReplies(), RecordedReplies()
        cancelled = asyncio.create_task(encoder.service.encode([slow], left))
        await left.arrived.acquire()
        assert 0 < encoder.admission.preprocess_s == encoder.admission.seconds
        call = asyncio.create_task(encoder.service.encode([slow], replies))
        await replies.arrived.acquire()
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        beside = RecordedReplies()
        await encoder.service.encode([image(png(64, 64))], beside)
        assert len(beside.shipments) == 1 and not any(isinstance(each, ItemFailed) for each in beside.events)
        await call
        [layout, failed] = replies.events
        assert isinstance(layout, LayoutEvent) and isinstance(failed, ItemFailed)
        assert isinstance(failed.error, MediaTooLarge) and "more than 0.1 s" in str(failed.error)
        assert (encoder.admission.num_patches, encoder.admission.seconds) == (0, 0.0)
    await supervisor.close()
    assert supervisor.failure is None
