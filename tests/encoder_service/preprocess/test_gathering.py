"""Items that wait are made together; one that is damaged or given up harms no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, QWEN3_VIDEO, encode, photo, settings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.gathering import Gathering
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia, Preprocessor
from vitrine_vlm.errors import MediaTruncated
from vitrine_vlm.service_runtime.supervisor import Supervisor


class Gated:
    """A real preprocessor's `patches_together` that waits for `gate` and notes how many items it is given."""

    def __init__(self, preprocessor: Preprocessor) -> None:
        self._preprocessor = preprocessor
        self.gate, self.entered = threading.Event(), threading.Event()
        self.counts: list[int] = []
        self.error: Exception | None = None

    def __call__(self, opened: Sequence[OpenedMedia]) -> list[torch.Tensor | Exception]:
        self.counts.append(len(opened))
        self.entered.set()
        assert self.gate.wait(20), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        return self._preprocessor.patches_together(opened)


@pytest.fixture
def preprocessor(tmp_path: Path) -> Preprocessor:
    return Preprocessor(settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO), MediaLimits())


async def test_what_waits_is_made_together_and_damage_stays_alone(preprocessor: Preprocessor) -> None:
    files = [encode(photo(300, 200, seed), "JPEG") for seed in range(20)]
    files[3] = files[3][:5000]
    opened = [preprocessor.open("image", file) for file in files]
    make = Gated(preprocessor)
    gathering = Gathering(make)
    gathering.start(Supervisor())
    first = asyncio.create_task(gathering.patches(opened[0]))
    assert await asyncio.to_thread(make.entered.wait, 10)
    others = [asyncio.create_task(gathering.patches(each)) for each in opened[1:]]
    await asyncio.sleep(0)
    others[4].cancel()
    await asyncio.sleep(0)
    make.gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert make.counts == [1, 15, 3], "at most 16 together, and none for those that gave up"
    assert isinstance(results[3], MediaTruncated) and isinstance(results[5], asyncio.CancelledError)
    for index in set(range(20)) - {3, 5}:
        patches = results[index]
        assert isinstance(patches, torch.Tensor)
        assert torch.equal(patches, preprocessor.open("image", files[index]).patches())
    await gathering.close()


async def test_a_failure_of_all_leaves_the_next_alone(preprocessor: Preprocessor) -> None:
    make = Gated(preprocessor)
    make.gate.set()
    make.error = RuntimeError("no GPU any more")
    gathering = Gathering(make)
    gathering.start(Supervisor())
    opened = preprocessor.open("image", encode(photo(300, 200, 1), "JPEG"))
    with pytest.raises(RuntimeError, match="no GPU"):
        await gathering.patches(opened)
    make.error = None
    assert len(await gathering.patches(opened)) == opened.layout.num_tokens * 4
    await gathering.close()
