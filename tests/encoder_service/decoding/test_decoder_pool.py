"""Decoding in processes: what hostile files, cancelled requests and crashes cost, and whom."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Set
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from tests.encoder_service.decoding import hostile
from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, QWEN3_VIDEO, encode, photo, settings, video
from vitrine_vlm.encoder_service.decoding.decoder_main import max_memory_nbytes
from vitrine_vlm.encoder_service.decoding.decoder_pool import DecoderPool
from vitrine_vlm.encoder_service.decoding.decoder_process import DecoderProcess
from vitrine_vlm.encoder_service.decoding.media_decoder import InProcessDecoder, MediaDecoder
from vitrine_vlm.encoder_service.decoding.priority import NICENESS
from vitrine_vlm.encoder_service.decoding.work import DecodeWork
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocess_pool import PreprocessPool
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.errors import MediaError, MediaTooLarge, MediaTruncated, NotAnImage
from vitrine_vlm.service_runtime import progress
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import MediaItem

LIMITS = MediaLimits(max_frames=1000)
LIGHT, HEAVY = DecodeWork("image", 0.0, 0), DecodeWork("image", 10.0, 1 << 20)
# 100 scans over 10 million pixels: allowed, and about a second of work.
SLOW = hostile.scans(3200, 3200, 100)
PICTURE = encode(photo(200, 150))
OWN_NICENESS, LEAST_PRIORITY = os.getpriority(os.PRIO_PROCESS, 0), 19

Result = TypeVar("Result")


@contextlib.asynccontextmanager
async def running(**options: Any) -> AsyncIterator[DecoderPool]:
    supervisor = Supervisor()
    defaults = {
        "max_pixels": LIMITS.max_pixels,
        "image_timeout_s": 5.0,
        "video_timeout_s": 5.0,
        "max_decoded_nbytes": 1 << 30,
    }
    pool = DecoderPool(2, **(defaults | options))
    pool.start(supervisor)
    try:
        yield pool
    finally:
        await pool.close()
        await supervisor.close()
        assert supervisor.failure is None


async def use(pool: DecoderPool, function: Callable[[DecoderProcess], Result], work: DecodeWork = LIGHT) -> Result:
    async with pool.decoder(work) as decoder:
        return await asyncio.to_thread(function, decoder)


def decode(decoder: MediaDecoder, data: bytes) -> np.ndarray[Any, Any]:
    with decoder.image_pixels(data, decoder.open_image(data, LIMITS)) as pixels_HWC:
        return pixels_HWC.copy()


def frames(decoder: MediaDecoder, data: bytes, indices: list[int]) -> list[np.ndarray[Any, Any]]:
    header = decoder.open_video(data, LIMITS)
    return [each.copy() for each in decoder.video_frames(data, header, indices, LIMITS)]


async def test_a_process_decodes_the_same_pixels_and_sees_the_same_faults() -> None:
    here = InProcessDecoder()
    formats = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
    pictures = [encode(photo(200, 150), each) for each in formats]
    pictures += [encode(photo(120, 90).convert("RGBA")), hostile.jpeg(2000, 1500, progressive=True)]
    indices = [0, 3, 3, 4, 9, 11]

    def compare(decoder: DecoderProcess) -> None:
        for data in pictures:
            assert np.array_equal(decode(decoder, data), decode(here, data))
            with pytest.raises(MediaTruncated):
                decode(decoder, data[: len(data) // 2])
        with pytest.raises(NotAnImage, match="no valid image"):
            decode(decoder, b"text")
        for data in (video(12), video(12, container="webm", codec="libvpx")):
            for one, other in zip(frames(decoder, data, indices), frames(here, data, indices), strict=True):
                assert np.array_equal(one, other)
        with pytest.raises(MediaTruncated):  # in the middle of the frames; the decoder goes on
            frames(decoder, video(12), [0, 5, 40])
        assert np.array_equal(decode(decoder, PICTURE), decode(here, PICTURE))

    async with running() as pool:
        await use(pool, compare)


@pytest.mark.parametrize("kind", ["image", "video"])
async def test_a_file_that_takes_too_long_is_the_senders_fault(kind: Any) -> None:
    async with running(image_timeout_s=0.1, video_timeout_s=0.1) as pool:
        pids = await started(pool)
        setting = "--decode-timeout-s" if kind == "image" else "--video-decode-timeout-s"
        with pytest.raises(MediaTooLarge, match=f"takes more than 0.1 s.*{setting} is the limit"):
            await use(pool, lambda decoder: decode(decoder, SLOW), DecodeWork(kind, 1.0, 0))
        assert len(await started(pool, replacing=pids) - pids) == 1


async def test_the_time_is_for_all_pictures_of_an_item() -> None:
    picture = hostile.scans(800, 800, 40)

    def decode_many(decoder: DecoderProcess) -> None:
        for _ in range(500):
            decode(decoder, picture)

    async with running(image_timeout_s=0.3) as pool:
        with pytest.raises(MediaTooLarge, match=r"more than 0.3 s"):
            await use(pool, decode_many)
        await use(pool, lambda decoder: decode(decoder, picture))


async def test_a_file_that_takes_too_much_memory() -> None:
    async with running(max_pixels=1 << 20) as pool:
        limits = MediaLimits(max_pixels=1 << 30)
        data = hostile.scans(24_000, 24_000, 2)

        def decode_large(decoder: DecoderProcess) -> None:
            with decoder.image_pixels(data, decoder.open_image(data, limits)):
                pass

        with pytest.raises(MediaTooLarge, match=f"more than {max_memory_nbytes(1 << 20) >> 20} MiB of memory"):
            await use(pool, decode_large)
        await use(pool, lambda decoder: decode(decoder, PICTURE))


async def test_a_decoder_that_is_killed_loses_its_item_alone() -> None:
    async with running() as pool:
        pids = await started(pool)
        used: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def decode_slowly(decoder: DecoderProcess) -> None:
            loop.call_soon_threadsafe(used.put_nowait, decoder.pid)
            decode(decoder, SLOW)

        item = asyncio.create_task(use(pool, decode_slowly, HEAVY))
        pid = await used.get()
        other = asyncio.create_task(use(pool, lambda decoder: decode(decoder, PICTURE)))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(MediaError, match="was ended by SIGKILL"):
            await item
        await other
        assert await started(pool, replacing=pids) & pids == pids - {pid}


@pytest.mark.parametrize("stage", ["decoding", "sending"])
async def test_a_decoder_that_is_stopped_loses_its_item_alone(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before it would be late."""
    monkeypatch.setattr(progress, "_LOOK_S", 0.05)
    large = SLOW if stage == "decoding" else bytes(16 << 20)

    def stop_and_decode(decoder: DecoderProcess) -> None:
        if stage == "decoding":
            decode(decoder, PICTURE)
            threading.Timer(0.1, os.kill, (decoder.pid, signal.SIGSTOP)).start()
        else:
            os.kill(decoder.pid, signal.SIGSTOP)
        decode(decoder, large)

    async with running(image_timeout_s=600.0) as pool:
        pids = await started(pool)
        with pytest.raises(MediaError, match=r"that decoded the file did nothing for 0.5 s: the file may be damaged"):
            await use(pool, stop_and_decode)
        assert len(await started(pool, replacing=pids) & pids) == 1
        await use(pool, lambda decoder: decode(decoder, PICTURE))


async def test_a_decoder_that_works_for_long_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_WALL_PER_CPU_S", 1e-3)
    async with running(image_timeout_s=100.0) as pool:
        with pytest.raises(MediaTooLarge, match="takes more than 100 s"):
            await use(pool, lambda decoder: decode(decoder, SLOW))


async def test_cancelling_ends_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as pool:
        preprocess_pool = PreprocessPool(preprocessor(tmp_path), pool, revision="")
        pids = await started(pool)
        slow = asyncio.create_task(preprocess_pool.patches((await open_item(preprocess_pool, SLOW))[0]))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert slow.cancelled() and len(await started(pool, replacing=pids) - pids) == 1
        assert time.monotonic() - start < 5
        # One that has nearly finished is kept.
        monkeypatch.setattr("vitrine_vlm.encoder_service.preprocess.preprocess_pool._CANCEL_GRACE_S", 20.0)
        pids = await started(pool)
        soon = asyncio.create_task(open_item(preprocess_pool, encode(photo(200, 150), "WEBP")))
        await asyncio.sleep(0)
        soon.cancel()
        await asyncio.gather(soon, return_exceptions=True)
        assert soon.cancelled() and await started(pool) == pids
        await preprocess_pool.close()


async def niceness_after_a_picture(pool: DecoderPool, decoder: DecoderProcess, lowered: set[int]) -> dict[int, int]:
    """The niceness of a decoder's threads once it has decoded a light item, by which none is lowered any more."""
    async with pool.decoder(LIGHT) as another:
        assert another is decoder
        await asyncio.to_thread(decode, decoder, PICTURE)
    async with asyncio.timeout(20):  # a lowered thread needs a core for its end, too
        while lowered & (niceness := niceness_of_threads(decoder.pid)).keys():
            await asyncio.sleep(0.01)
    assert set(niceness.values()) == {0}
    return niceness


@pytest.mark.skipif(OWN_NICENESS == LEAST_PRIORITY, reason="nothing has a lower priority than these tests")
@pytest.mark.parametrize("kind", ["image", "video"])
async def test_a_decoder_has_a_lower_priority_while_an_item_takes_long_and_not_after_it(kind: str) -> None:
    """It is that of its threads, of which libraries have their own, as Linux shows it."""
    data, decode_once = (SLOW, decode) if kind == "image" else (video(12), decode_frames)
    is_lowered = threading.Event()

    def decode_for_long(decoder: MediaDecoder) -> None:
        """Many requests of one item."""
        while not is_lowered.is_set():
            decode_once(decoder, data)

    async with running(image_timeout_s=100.0) as pool:
        async with pool.decoder(LIGHT) as decoder:
            await asyncio.to_thread(decode, decoder, PICTURE)
            before = niceness_of_threads(decoder.pid)
            assert set(before.values()) == {0}
            item = asyncio.create_task(asyncio.to_thread(decode_for_long, decoder))
            try:
                lowered = await lowered_threads(decoder.pid)
            finally:
                is_lowered.set()
            assert before.keys() - {decoder.pid} <= lowered
            await item
        for _ in range(2):
            assert len(await niceness_after_a_picture(pool, decoder, lowered)) == len(before)


@pytest.mark.skipif(OWN_NICENESS == LEAST_PRIORITY, reason="nothing has a lower priority than these tests")
async def test_an_item_that_is_expected_to_take_long_has_a_lower_priority_from_the_beginning() -> None:
    data = video(12)

    def decode_some(decoder: DecoderProcess) -> set[int]:
        """The threads that are lowered after the first frame; those of the library among them."""
        each = decoder.video_frames(data, decoder.open_video(data, LIMITS), range(12), LIMITS)
        next(each)
        niceness = niceness_of_threads(decoder.pid)
        assert sum(1 for _ in each) == 11
        assert niceness.pop(decoder.pid) == 0
        assert set(niceness.values()) == {min(NICENESS, LEAST_PRIORITY - OWN_NICENESS)}
        return set(niceness)

    async with running() as pool:
        for _ in range(2):
            async with pool.decoder(HEAVY) as decoder:
                lowered = await asyncio.to_thread(decode_some, decoder)
                assert len(lowered) > 1
            await niceness_after_a_picture(pool, decoder, lowered)


def test_a_video_is_decoded_by_as_many_threads_as_the_process_may_use_cores() -> None:
    """One more than these."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        data, decoder = video(12), InProcessDecoder()
        each = decoder.video_frames(data, decoder.open_video(data, LIMITS), range(12), LIMITS)
        next(each)
        assert num_ffmpeg_threads() == 2
        assert sum(1 for _ in each) == 11
    finally:
        os.sched_setaffinity(0, cores)


async def test_a_picture_beside_two_that_take_long(tmp_path: Path) -> None:
    async with running() as pool:
        preprocess_pool = PreprocessPool(preprocessor(tmp_path), pool, revision="")
        slow_ones = [(await open_item(preprocess_pool, SLOW))[0] for _ in range(2)]
        assert not any(each.decode_work is None or each.decode_work.is_light for each in slow_ones)
        slow = [asyncio.create_task(preprocess_pool.patches(each)) for each in slow_ones]
        await asyncio.sleep(0.05)
        opened, _ = await open_item(preprocess_pool, PICTURE)
        assert (await preprocess_pool.patches(opened)).shape[0] == opened.layout.num_tokens * 4
        assert not any(each.done() for each in slow), "the picture waited for one of them"
        for each in slow:
            each.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await preprocess_pool.close()


async def test_items_that_take_long_share_a_budget_of_memory_and_wait_in_turn() -> None:
    order: list[str] = []

    async def item(pool: DecoderPool, name: str, work: DecodeWork, gate: asyncio.Event) -> None:
        async with pool.decoder(work):
            order.append(name)
            await gate.wait()

    async with running(max_decoded_nbytes=1 << 20) as pool:
        await started(pool)
        gate = asyncio.Event()
        names = {"first": HEAVY, "second": HEAVY, "light": LIGHT, "third": HEAVY}
        items = [asyncio.create_task(item(pool, name, work, gate)) for name, work in names.items()]
        await asyncio.sleep(0.01)
        assert order == ["first", "light"]
        items[1].cancel()
        gate.set()
        await asyncio.gather(*items, return_exceptions=True)
        assert order == ["first", "light", "third"]


async def test_many_files_that_take_more_keep_no_small_one_waiting() -> None:
    """Each of them takes less than what only some decoders may do."""
    order: list[str] = []

    async def item(pool: DecoderPool, name: str, work: DecodeWork, wait_s: float) -> None:
        async with pool.decoder(work):
            order.append(name)
            await asyncio.sleep(wait_s)

    async with running() as pool:
        await started(pool)
        larger = DecodeWork("image", 0.2, 1 << 20)
        tasks = [asyncio.create_task(item(pool, f"larger {number}", larger, 0.1)) for number in range(8)]
        await asyncio.sleep(0.15)
        tasks.append(asyncio.create_task(item(pool, "small", LIGHT, 0.0)))
        await asyncio.gather(*tasks)
    assert order.index("small") <= 5, order
    assert [each for each in order if each != "small"] == [f"larger {number}" for number in range(8)]


async def test_large_pictures_leave_no_memory_in_use() -> None:
    data = encode(photo(64, 48).resize((4000, 4000)), "JPEG")
    async with running() as pool:
        await use(pool, lambda decoder: decode(decoder, PICTURE))
        await use(pool, lambda decoder: decode(decoder, data))
        shared = [shared_nbytes(pid) for pid in await started(pool)]
        assert max(shared) < 1 << 20, "48 MB of pixels"


async def test_decoders_that_cannot_start_end_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    supervisor = Supervisor()
    pool = DecoderPool(2, max_pixels=100, image_timeout_s=1, video_timeout_s=1, max_decoded_nbytes=1)
    pool.start(supervisor)
    failure = await asyncio.wait_for(supervisor.failed(), 20)
    assert failure.name.startswith("decoder ")
    await pool.close()


def decode_frames(decoder: MediaDecoder, data: bytes) -> None:
    frames(decoder, data, list(range(12)))


def num_ffmpeg_threads() -> int:
    """Threads of FFmpeg's decoders in this process, as it names them."""
    return sum((each / "comm").read_text().startswith("av:") for each in Path("/proc/self/task").iterdir())


def niceness_of_threads(pid: int) -> dict[int, int]:
    """How much lower than that of these tests each thread's priority is, by its id."""
    niceness = {}
    for each in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            niceness[int(each.name)] = os.getpriority(os.PRIO_PROCESS, int(each.name)) - OWN_NICENESS
    return niceness


async def lowered_threads(pid: int) -> set[int]:
    """The threads of a process with a lower priority, all but the main one, once they have it."""
    async with asyncio.timeout(20):
        while True:
            niceness = niceness_of_threads(pid)
            assert niceness.pop(pid) == 0
            if niceness and set(niceness.values()) == {min(NICENESS, LEAST_PRIORITY - OWN_NICENESS)}:
                return set(niceness)
            await asyncio.sleep(0.01)


def preprocessor(folder: Path) -> Preprocessor:
    return Preprocessor(settings(folder, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO), LIMITS)


async def open_item(pool: PreprocessPool, data: bytes) -> Any:
    return await pool.open(MediaItem("image", data=data), (data,))


async def started(pool: DecoderPool, replacing: Set[int] = frozenset()) -> set[int]:
    """The processes, once all are there, and one of those that it replaces is not."""
    async with asyncio.timeout(20):
        while len(pool.pids) < pool.num_processes or set(pool.pids) == replacing:
            await asyncio.sleep(0.01)
    return set(pool.pids)


def shared_nbytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0]) * 1024
