"""Several items at once in one preprocessor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, QWEN3_VIDEO, encode, photo, settings, video
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor


def test_items_in_threads_equal_items_one_by_one(tmp_path: Path) -> None:
    preprocessor = Preprocessor(settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO), MediaLimits())
    items: list[tuple[Any, bytes]] = [("image", encode(photo(300, 200, seed), "JPEG")) for seed in range(8)]
    items += [("video", video(20 + seed)) for seed in range(8)]

    def patches(item: tuple[Any, bytes]) -> torch.Tensor:
        return preprocessor.open(*item).patches()

    alone = [patches(item) for item in items]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(patches, items))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
