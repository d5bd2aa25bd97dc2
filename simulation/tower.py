"""What a simulated encoder has in place of a GPU, media and files: their sizes, and how long each takes."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.pools.pool import Block, ExportPool, PoolMapping, PoolSource
from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.encoder_service.decoding.media_decoder import MediaDecoder
from vitrine_vlm.encoder_service.decoding.work import DecodeWork
from vitrine_vlm.encoder_service.engine.cost_model import CostModel
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia
from vitrine_vlm.service_runtime.byte_budget import Reserve
from vitrine_vlm.simulation.costs import IDENTITY, MERGE_SIZE, OPEN_S, preprocess_s
from vitrine_vlm.simulation.virtual_loop import VirtualLoop
from vitrine_vlm.simulation.workload import Picture
from vitrine_vlm.types import Layout, MediaItem

# Bytes of a JPEG for each of its pixels.
_NBYTES_A_PIXEL = 0.2
# By how much one batch differs from another of the same size.
_NOISE = 0.02
_ROW_NBYTES = IDENTITY.row_width * DTYPES[IDENTITY.dtype].itemsize


def item_of(picture: Picture) -> MediaItem:
    """The item that a worker sends for a picture."""
    return MediaItem("image", url=f"simulated:{picture.height}x{picture.width}:{picture.key}")


def _picture_of(item: MediaItem) -> Picture:
    assert item.url is not None
    return _picture_at(item.url)


@lru_cache(1000)  # each is asked for twice
def _picture_at(url: str) -> Picture:
    _, size, key = url.split(":", 2)
    height, width = map(int, size.split("x"))
    return Picture(key, height, width)


@cache
def _patches(number: int) -> torch.Tensor:
    """So many patches of no bytes."""
    return torch.empty((number, 0))


class SizedRows:
    """What stands for rows: as much of a tensor as the services use. torch's own without memory take far longer."""

    __slots__ = ("nbytes", "shape")

    is_cuda = False

    def __init__(self, num_rows: int) -> None:
        self.shape = (num_rows, IDENTITY.row_width)
        self.nbytes = num_rows * _ROW_NBYTES

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, numbers: Sequence[int]) -> tuple[SizedRows, ...]:
        return tuple(map(SizedRows, numbers))

    def clone(self, memory_format: torch.memory_format) -> SizedRows:
        return self


class SimulatedTower:
    """Takes as long as the cost model says, `factor` times, and a little more or less.

    busy_s: seconds in which it has computed. slowest: the largest factor of a batch so far. is_broken: whether every
    batch fails.
    """

    out_hidden_size = IDENTITY.out_hidden_size
    deepstack_visual_indexes = IDENTITY.deepstack_visual_indexes
    row_width = IDENTITY.row_width
    merge_unit = MERGE_SIZE**2

    def __init__(self, loop: VirtualLoop, rng: random.Random, cost: CostModel, *, is_broken: bool) -> None:
        self.factor = self.slowest = 1.0
        self.is_broken = is_broken
        self.busy_s = 0.0
        self._loop, self._rng = loop, rng
        self._cost = cost

    def forward(self, patches_PX: torch.Tensor, grid_thw: list[tuple[int, int, int]]) -> torch.Tensor:
        if self.is_broken:
            raise RuntimeError("this version of the encoder fails")
        seconds = self.factor * self._cost.batch_seconds(grid_thw) * (1 + _NOISE * self._rng.uniform(-1, 1))
        self._loop.block(seconds)
        self.busy_s += seconds
        self.slowest = max(self.slowest, self.factor)
        return cast("torch.Tensor", SizedRows(patches_PX.shape[0] // self.merge_unit))


@dataclass(frozen=True)
class _Opened:
    """A picture whose size is known; a GPU decodes it."""

    layout: Layout
    decodes_on_gpu: bool = True
    decode_work: DecodeWork | None = None

    def patches(self, decoder: MediaDecoder | None = None) -> torch.Tensor:
        return _patches(math.prod(self.layout.grid_thw))


class SimulatedLoader:
    """Media that are there at once, and count as many bytes as a JPEG of their size."""

    async def load_files(self, item: MediaItem, reserve: Reserve) -> Sequence[bytes]:
        picture = _picture_of(item)
        reserve(int(_NBYTES_A_PIXEL * picture.height * picture.width))
        return ()


class SimulatedPreprocessing:
    """Opens and decodes any number of pictures at once, as a GPU does."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    async def open(self, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
        picture = _picture_of(item)
        await self._loop.after(OPEN_S)
        content_hash = hashlib.sha256(item.content_key).digest()
        layout = Layout("image", picture.grid_thw, picture.num_tokens, content_hash=content_hash)
        return _Opened(layout), layout

    async def patches(self, opened: OpenedMedia) -> torch.Tensor:
        await self._loop.after(preprocess_s(math.prod(opened.layout.grid_thw)))
        return opened.patches()

    def queue_seconds(self, opened: OpenedMedia) -> float:
        return 0.0


class SimulatedPool(ExportPool):
    """A pool whose blocks have places and sizes, and no memory."""

    transport = "cuda_ipc"

    def write(self, block: Block, rows: RowSource) -> None:
        """Does nothing: rows have no content."""

    def supports_device(self, device: torch.device) -> bool:
        return False

    def write_async(self, block: Block, rows_TW: torch.Tensor) -> None:
        """Does nothing, see `write`."""

    def close(self) -> None:
        """Does nothing: no memory is mapped."""

    def _write_header(self, offset: int, header: bytes) -> None:
        """Does nothing, see `write`."""


class SimulatedMapping(PoolMapping):
    """A worker's side of such a pool."""

    def source(self) -> PoolSource:
        raise NotImplementedError("a simulated pool cannot be mapped by another process")

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        return bytes(nbytes)

    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return cast("torch.Tensor", SizedRows(shape[0]))
