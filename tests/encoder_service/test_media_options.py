"""Options and lists of frames over gRPC: rows follow them, and no cache mixes them up."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest
import torch
from PIL import Image

from tests.encoder_service.running import RunningEncoder, png, run_encoder
from tests.encoder_service.test_patches import encode, layouts_of, rows_of
from tests.integration.media import clip
from tests.integration.media_server import serve_media
from vitrine_vlm.embedding_transport.wire.messages import item_to_proto
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaOptions, Ticket

PICTURE = png(192, 128)
CLIP = clip(1, 96, 64, 20).data


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder]:
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 24) as encoder:
        yield encoder


def sized(max_pixels: int | None, data: bytes = PICTURE) -> MediaItem:
    return MediaItem("image", data=data, options=MediaOptions(max_pixels=max_pixels))


def expected_rows(encoder: RunningEncoder, item: MediaItem) -> torch.Tensor:
    """Made without service, cache and transport."""
    if item.frames is not None:
        opened = encoder.preprocessor.open_frames([frame.data or b"" for frame in item.frames], item.options)
    else:
        opened = encoder.preprocessor.open(item.kind, item.data or b"", item.options)
    return encoder.tower._tower.forward(opened.patches(), [opened.layout.grid_thw])


def failures_of(responses: list[encoder_pb2.EncodeResponse]) -> list[tuple[str, str]]:
    failed = [response.failed for response in responses if response.WhichOneof("event") == "failed"]
    return [(each.code, each.message) for each in failed]


async def test_one_picture_with_several_options_in_one_request_and_in_later_ones(encoder: RunningEncoder) -> None:
    items = [sized(None), sized(8192), sized(4096), sized(8192)]
    expected = [expected_rows(encoder, item) for item in items]
    assert len({len(rows) for rows in expected}) == 3
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0]):
        responses = await encode(encoder, *(items[each] for each in order))
        hashes = layouts_of(responses)
        for index, each in enumerate(order):
            rows = rows_of(responses, index, encoder.identity.row_width)
            assert rows.shape == expected[each].shape
            assert (rows - expected[each]).abs().max() < 1e-4
        assert len({layout.content_hash for layout in hashes.values()}) == min(len(order), 3)
    assert sum(len(grids) for grids in encoder.tower.batches) == 3


async def test_options_of_videos(encoder: RunningEncoder) -> None:
    options = [
        MediaOptions(),
        MediaOptions(fps=4.0),
        MediaOptions(num_frames=6),
        MediaOptions(sampled=False),
        MediaOptions(max_frames=4),
        MediaOptions(start_s=1.0, end_s=2.0),
        MediaOptions(min_pixels=4096, max_pixels=20_000),
    ]
    items = [MediaItem("video", data=CLIP, options=each) for each in options]
    responses = await encode(encoder, *items)
    layouts = layouts_of(responses)
    assert len({layout.content_hash for layout in layouts.values()}) == len(options)
    for index, item in enumerate(items):
        rows, expected = rows_of(responses, index, encoder.identity.row_width), expected_rows(encoder, item)
        assert rows.shape == expected.shape and (rows - expected).abs().max() < 1e-4
    assert layouts[5].timestamps_s[0] > 1.0


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(96, 64, seed))).save(file, "JPEG")
    return file.getvalue()


async def test_frames_come_as_bytes_as_urls_and_in_one_url(encoder: RunningEncoder) -> None:
    files = [jpeg(seed) for seed in range(5)]
    item = MediaItem("video", frames=tuple(MediaItem("image", data=file) for file in files))
    listed = "data:video/jpeg;base64," + ",".join(base64.b64encode(file).decode() for file in files)
    async with serve_media() as server:
        server.files = {f"/{index}.jpg": file for index, file in enumerate(files)}
        urls = MediaItem("video", frames=tuple(MediaItem("image", url=server.url(path)) for path in server.files))
        faster = MediaItem("video", frames=item.frames, options=MediaOptions(fps=8.0))
        responses = await encode(encoder, item, urls, MediaItem("video", url=listed), faster)
        reverse = await encode(encoder, MediaItem("video", frames=(item.frames or ())[::-1]))
    layouts = layouts_of(responses)
    assert layouts[0].content_hash == layouts[1].content_hash == layouts[2].content_hash != layouts[3].content_hash
    assert layouts_of(reverse)[0].content_hash != layouts[0].content_hash
    assert (list(layouts[0].timestamps_s), list(layouts[3].timestamps_s)) == ([0.25, 1.25, 2.0], [0.0625, 0.3125, 0.5])
    expected = expected_rows(encoder, item)
    for index in range(4):
        assert (rows_of(responses, index, encoder.identity.row_width) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("item", "code", "message"),
    [
        (sized(0), "invalid_media", "max_pixels is 0"),
        (MediaItem("image", data=PICTURE, options=MediaOptions(min_pixels=1 << 40)), "media_too_large", "at most"),
        (MediaItem("image", data=PICTURE, options=MediaOptions(num_frames=3)), "invalid_media", "an image has no"),
        (MediaItem("video", data=CLIP, options=MediaOptions(num_frames=1 << 31)), "media_too_large", "num_frames is"),
        (MediaItem("video", frames=(MediaItem("image", data=b"x"),)), "not_an_image", "frame 0"),
        (MediaItem("video", frames=(MediaItem("image", url="data:,%4"),)), "invalid_media", "frame 0"),
        (MediaItem("video", url="data:video/jpeg;base64,QUJD,!"), "invalid_media", "frame 1"),
    ],
)  # fmt: skip
async def test_what_cannot_be_fails_its_item_alone(
    encoder: RunningEncoder, item: MediaItem, code: str, message: str
) -> None:
    responses = await encode(encoder, item, sized(None))
    ((found, words),) = failures_of(responses)
    assert found == code and message in words
    assert len(rows_of([each for each in responses if not each.HasField("failed")], 1, encoder.identity.row_width))


async def test_malformed_items_are_refused(encoder: RunningEncoder) -> None:
    stub = encoder_pb2_grpc.EncoderStub(encoder.channel)
    options = encoder_pb2.MediaOptions(max_pixels=4096)
    video = encoder_pb2.MEDIA_KIND_VIDEO
    frames = [encoder_pb2.Frame(data=b"x")] * (MAX_LISTED_FRAMES + 1)
    ticket = item_to_proto(MediaItem("image", ticket=Ticket("id", bytes(16))))
    ticket.options.CopyFrom(options)
    for item in (
        ticket,
        encoder_pb2.MediaItem(kind=video, patches=encoder_pb2.Patches(grid_thw=[1, 2, 2]), options=options),
        encoder_pb2.MediaItem(kind=video, frames=encoder_pb2.Frames()),
        encoder_pb2.MediaItem(kind=video, frames=encoder_pb2.Frames(frames=frames)),
        encoder_pb2.MediaItem(kind=video, frames=encoder_pb2.Frames(frames=[encoder_pb2.Frame()])),
        encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, frames=encoder_pb2.Frames(frames=frames[:1])),
        encoder_pb2.MediaItem(kind=video, url="data:video/jpeg;base64," + "," * MAX_LISTED_FRAMES),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Encode(encoder_pb2.EncodeRequest(items=[item])):
                pass
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
