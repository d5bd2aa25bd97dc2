"""Runs a preprocessor beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from vitrine_vlm.encoder_service.preprocess.jpeg_batcher import JpegBatcher
from vitrine_vlm.encoder_service.preprocess.preprocessor import OpenedMedia, Preprocessor
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import NO_OPTIONS, Layout, MediaItem

Result = TypeVar("Result")


class PreprocessPool:
    """Threads that open and preprocess items, and the batcher of JPEGs that a GPU decodes.

    It belongs to one event loop.
    """

    def __init__(self, preprocessor: Preprocessor, *, revision: str, num_threads: int) -> None:
        """
        Args:
            revision: the model's; part of an item's content hash.
            num_threads: items opened and preprocessed at once, besides JPEGs on a GPU.
        """
        self._preprocessor = preprocessor
        self._hash_seed = f"{preprocessor.settings.fingerprint()}:{revision}"
        self._jpeg_batcher = JpegBatcher(preprocessor.patches_of_batch)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="encoder-preprocess")

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loops that batch JPEGs, which the supervisor owns."""
        self._jpeg_batcher.start(supervisor)

    async def close(self) -> None:
        """Discards decoding that has not begun and waits for the rest."""
        await self._jpeg_batcher.close()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def open(self, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
        """Opens an item, which was loaded as `files`; returns also its layout with its content hash.

        Raises:
            MediaError: see `Preprocessor.open`, `Preprocessor.open_frames` and `Preprocessor.open_patches`.
        """
        return await self._in_thread(self._open, item, files)

    async def patches(self, opened: OpenedMedia) -> torch.Tensor:
        """See `OpenedMedia.patches`."""
        if opened.decodes_on_gpu:
            return await self._jpeg_batcher.patches(opened)
        return await self._in_thread(opened.patches)

    def _open(self, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
        if item.patches is not None:
            opened = self._preprocessor.open_patches(item.kind, item.patches)
        elif item.frames is not None:
            opened = self._preprocessor.open_frames(files, item.options)
        else:
            opened = self._preprocessor.open(item.kind, files[0], item.options)
        return opened, replace(opened.layout, content_hash=self._content_hash(item, files))

    def _content_hash(self, item: MediaItem, files: Sequence[bytes]) -> bytes:
        """SHA-256 over everything that decides the rows; equal items have equal rows."""
        head = f"{self._hash_seed}:{item.kind}:{item.options.fps}:"
        # In front, where no file's bytes can stand.
        if item.patches is not None:
            # The representation leaves out the patches' own bytes: `files`.
            head = f"patches:{item.patches!r}:{head}"
        if item.frames is not None:
            head = f"frames:{[len(file) for file in files]}:{head}"
        if (others := replace(item.options, fps=None)) != NO_OPTIONS:
            head = f"options:{others!r}:{head}"
        digest = hashlib.sha256(head.encode())
        for file in files:
            digest.update(file)
        return digest.digest()

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
