"""Runs a preprocessor beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import Protocol, TypeVar

import torch

from vitrine_vlm.encoder_service.decoding.media_decoder import MediaDecoder
from vitrine_vlm.encoder_service.decoding.plain_header import NotPlain, PlainHeaders
from vitrine_vlm.encoder_service.decoding.work import DecodeWork, opening_work
from vitrine_vlm.encoder_service.preprocess.jpeg_batcher import JpegBatcher
from vitrine_vlm.encoder_service.preprocess.preprocessor import NotForGpu, OpenedMedia, Preprocessor
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import NO_OPTIONS, Layout, MediaItem

Result = TypeVar("Result")
# A decoder that has nearly finished need not be started again.
_CANCEL_GRACE_S = 0.2
# A plain picture of up to so many bytes is opened on the event loop: in 0.1 ms, which is less than a thread costs.
_OPENED_AT_ONCE_NBYTES = 64 * 1024
_PLAIN_HEADERS = PlainHeaders()


class KillableDecoder(MediaDecoder, Protocol):
    """A decoder of one item, which fails once it is killed."""

    def kill(self) -> None:
        """Ends it, whatever it does."""
        ...


class Decoders(Protocol):
    """Decoders for so many items at once."""

    num_processes: int

    def decoder(self, work: DecodeWork) -> AbstractAsyncContextManager[KillableDecoder]:
        """A decoder for one item, as soon as one may be used for such work."""
        ...

    async def close(self) -> None:
        """Ends all decoders."""
        ...


class PreprocessPool:
    """Threads that open and preprocess items, each with a decoder, and the batcher of JPEGs that a GPU decodes.

    It belongs to one event loop.
    """

    def __init__(self, preprocessor: Preprocessor, decoders: Decoders, *, revision: str) -> None:
        """
        Args:
            decoders: as many items are opened and preprocessed at once, besides JPEGs on a GPU; closed here.
            revision: the model's; part of an item's content hash.
        """
        self._decoders = decoders
        self._preprocessor = preprocessor
        self._hash_seed = f"{preprocessor.settings.fingerprint()}:{revision}"
        self._jpeg_batcher = JpegBatcher(preprocessor.patches_of_batch)
        self._threads = ThreadPoolExecutor(decoders.num_processes, thread_name_prefix="encoder-preprocess")

    def start(self, supervisor: Supervisor) -> None:
        """Starts the loops that batch JPEGs, which the supervisor owns."""
        self._jpeg_batcher.start(supervisor)

    async def close(self) -> None:
        """Ends the decoders, whose items fail, and waits for the threads."""
        await self._decoders.close()
        await self._jpeg_batcher.close()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def open(self, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
        """Opens an item, which was loaded as `files`; returns also its layout with its content hash.

        Raises:
            MediaError: see `Preprocessor.open`, `Preprocessor.open_frames` and `Preprocessor.open_patches`.
        """
        if item.patches is not None:
            return await asyncio.wrap_future(self._threads.submit(self._open_patches, item, files))
        if item.kind == "image" and len(files[0]) <= _OPENED_AT_ONCE_NBYTES:
            with suppress(NotPlain):
                return self._open_files(item, files, _PLAIN_HEADERS)
        async with self._decoders.decoder(opening_work(item.kind, files)) as decoder:
            return await self._run(decoder, self._open_files, item, files, decoder)

    async def patches(self, opened: OpenedMedia) -> torch.Tensor:
        """See `OpenedMedia.patches`; cancelling ends the decoder."""
        if opened.decodes_on_gpu:
            try:
                return await self._jpeg_batcher.patches(opened)
            except NotForGpu:
                pass
        if opened.decode_work is None:
            return await asyncio.wrap_future(self._threads.submit(opened.patches))
        async with self._decoders.decoder(opened.decode_work) as decoder:
            return await self._run(decoder, opened.patches, decoder)

    def queue_seconds(self, opened: OpenedMedia) -> float:
        """How much longer others wait for their patches because of this item, by estimation; 0 where a GPU decodes."""
        if opened.decodes_on_gpu or opened.decode_work is None:
            return 0.0
        seconds = opened.decode_work.seconds + self._preprocessor.patch_seconds(opened.layout)
        return seconds / self._decoders.num_processes

    async def _run(self, decoder: KillableDecoder, function: Callable[..., Result], *arguments: object) -> Result:
        """Runs a function that uses the decoder on a thread. Once this is cancelled or ends, the thread has left it."""
        running = asyncio.wrap_future(self._threads.submit(function, *arguments))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            try:
                await asyncio.wait([running], timeout=_CANCEL_GRACE_S)
            finally:
                if not running.done():
                    decoder.kill()
            await asyncio.gather(running, return_exceptions=True)
            raise

    def _open_patches(self, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
        assert item.patches is not None
        return self._with_layout(self._preprocessor.open_patches(item.kind, item.patches), item, files)

    def _open_files(self, item: MediaItem, files: Sequence[bytes], decoder: MediaDecoder) -> tuple[OpenedMedia, Layout]:
        if item.frames is not None:
            opened = self._preprocessor.open_frames(files, item.options, decoder)
        else:
            opened = self._preprocessor.open(item.kind, files[0], item.options, decoder)
        return self._with_layout(opened, item, files)

    def _with_layout(self, opened: OpenedMedia, item: MediaItem, files: Sequence[bytes]) -> tuple[OpenedMedia, Layout]:
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
