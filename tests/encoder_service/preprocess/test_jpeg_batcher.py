"""Items that wait are decoded in one batch; one that is damaged or cancelled harms no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, QWEN3_VIDEO, encode, photo, settings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.jpeg_batcher import JpegBatcher
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia, Preprocessor
from vitrine_vlm.errors import MediaTruncated
from vitrine_vlm.service_runtime.supervisor import Supervisor


class Gated:
    """Computes patches one by one; waits for `gate`, and records the size of each batch."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batch_sizes: list[int] = []
        self.error: Exception | None = None

    def __call__(self, opened: Sequence[OpenedMedia]) -> list[torch.Tensor | Exception]:
        self.batch_sizes.append(len(opened))
        self.entered.set()
        assert self.gate.wait(20), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        return [self._patches(each) for each in opened]

    @staticmethod
    def _patches(opened: OpenedMedia) -> torch.Tensor | Exception:
        try:
            return opened.patches()
        except MediaTruncated as error:
            return error


@pytest.fixture
def preprocessor(tmp_path: Path) -> Preprocessor:
    return Preprocessor(settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO), MediaLimits())


async def test_what_waits_is_one_batch_and_only_damaged_items_fail(preprocessor: Preprocessor) -> None:
    files = [encode(photo(300, 200, seed), "JPEG") for seed in range(20)]
    files[3] = files[3][:5000]
    opened = [preprocessor.open("image", file) for file in files]
    compute = Gated()
    batcher = JpegBatcher(compute)
    batcher.start(Supervisor())
    first = asyncio.create_task(batcher.patches(opened[0]))
    assert await asyncio.to_thread(compute.entered.wait, 10)
    others = [asyncio.create_task(batcher.patches(each)) for each in opened[1:]]
    await asyncio.sleep(0)
    others[4].cancel()
    await asyncio.sleep(0)
    compute.gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert compute.batch_sizes == [1, 15, 3], "at most 16 in a batch, and none that were cancelled"
    assert isinstance(results[3], MediaTruncated) and isinstance(results[5], asyncio.CancelledError)
    for index in set(range(20)) - {3, 5}:
        patches = results[index]
        assert isinstance(patches, torch.Tensor)
        assert torch.equal(patches, preprocessor.open("image", files[index]).patches())
    await batcher.close()


async def test_a_batch_that_fails_does_not_fail_the_next(preprocessor: Preprocessor) -> None:
    compute = Gated()
    compute.gate.set()
    compute.error = RuntimeError("no GPU any more")
    batcher = JpegBatcher(compute)
    batcher.start(Supervisor())
    opened = preprocessor.open("image", encode(photo(300, 200, 1), "JPEG"))
    with pytest.raises(RuntimeError, match="no GPU"):
        await batcher.patches(opened)
    compute.error = None
    assert len(await batcher.patches(opened)) == opened.layout.num_tokens * 4
    await batcher.close()
