"""Patches as a source of Encode: the rows of the media that they were cut from; errors; cache, budget and hashes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from tests.encoder_service.processed import patches_of
from tests.encoder_service.running import RunningEncoder, run_encoder
from tests.integration.media import clip, picture
from vitrine_vlm.embedding_transport.wire.messages import item_to_proto
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import MediaItem

PICTURE, CLIP = (MediaItem(m.kind, data=m.data) for m in (picture(1, 200, 120), clip(2, 96, 64, 21)))


async def encode(encoder: RunningEncoder, *items: MediaItem) -> list[encoder_pb2.EncodeResponse]:
    stub = encoder_pb2_grpc.EncoderStub(encoder.channel)
    request = encoder_pb2.EncodeRequest(items=map(item_to_proto, items))
    return [response async for response in stub.Encode(request)]


def rows_of(responses: list[encoder_pb2.EncodeResponse], index: int, width: int) -> torch.Tensor:
    failed = [response.failed for response in responses if response.WhichOneof("event") == "failed"]
    assert not failed
    chunks = [r.chunk for r in responses if r.WhichOneof("event") == "chunk" and r.chunk.item_index == index]
    data = bytearray(b"".join(chunk.data for chunk in chunks))
    return torch.frombuffer(data, dtype=torch.float32).view(-1, width)


def layouts_of(responses: list[encoder_pb2.EncodeResponse]) -> dict[int, encoder_pb2.Layout]:
    layouts = [response.layout for response in responses if response.WhichOneof("event") == "layout"]
    return {layout.item_index: layout for layout in layouts}


async def test_patches_give_the_rows_of_their_media(tower_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(tower_folder, tmp_path) as encoder:
        width = encoder.identity.row_width
        media = await encode(encoder, PICTURE, CLIP)
        times = tuple(layouts_of(media)[1].timestamps_s)
        for dtype, accuracy in (("uint8", 1e-4), ("float32", 1e-4), ("bfloat16", 0.05)):
            cut = [
                MediaItem("image", patches=patches_of(tower_folder, PICTURE, dtype)),
                MediaItem("video", patches=patches_of(tower_folder, CLIP, dtype, times)),
            ]
            responses = await encode(encoder, *cut)
            for index in (0, 1):
                expected = rows_of(media, index, width)
                assert expected.std() > 0.1, "weights too small for a difference to show"
                assert (rows_of(responses, index, width) - expected).abs().max() < accuracy
            found, wanted = layouts_of(responses), layouts_of(media)
            assert all(found[index].grid_thw == wanted[index].grid_thw for index in (0, 1))
            assert list(found[1].timestamps_s) == list(times)


async def test_bad_patches_fail_alone_and_hold_no_memory(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    good = patches_of(qwen3_vl_folder, PICTURE, "uint8")
    bad = [replace(good, data=good.data[1:]), replace(good, grid_thw=(1, (1 << 32) - 2, (1 << 32) - 2))]
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        responses = await encode(encoder, *(MediaItem("image", patches=patches) for patches in (*bad, good)))
        failed = {r.failed.item_index: r.failed for r in responses if r.WhichOneof("event") == "failed"}
        assert {index: each.code for index, each in failed.items()} == {0: "invalid_media", 1: "media_too_large"}
        assert f"{len(good.data) - 1} bytes" in failed[0].message and str((1 << 32) - 2) in failed[1].message
        assert layouts_of(responses).keys() == {2}
        held = encoder.metrics.registry.get_sample_value("vitrine_encoder_held_media_bytes")
        assert (held, encoder.admission.num_patches) == (0, 0)


async def test_a_grid_has_three_numbers(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    message = item_to_proto(MediaItem("image", patches=patches_of(qwen3_vl_folder, PICTURE, "uint8")))
    message.patches.grid_thw.append(1)
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        with pytest.raises(grpc.aio.AioRpcError, match="item 0 has patches with a grid of 4 numbers"):
            call = encoder_pb2_grpc.EncoderStub(encoder.channel).Encode(encoder_pb2.EncodeRequest(items=[message]))
            [response async for response in call]


async def test_patches_are_cached_and_bounded_like_media(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    item = MediaItem("image", patches=patches_of(qwen3_vl_folder, PICTURE, "uint8"))
    assert item.patches is not None
    # An item counts twice, its message and itself: two items fit in their message and one of them besides.
    held = 3 * len(item.patches.data) + 4096
    async with run_encoder(qwen3_vl_folder, tmp_path, cache_bytes=1 << 20, max_held_bytes=held) as encoder:
        await encode(encoder, item)
        await encode(encoder, item)
        assert sum(map(len, encoder.tower.batches)) == 1
        both = await encode(encoder, item, item)
        assert [r.failed.code for r in both if r.WhichOneof("event") == "failed"] == ["overloaded"]


async def test_whatever_decides_the_rows_is_in_the_hash(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    pixels = patches_of(qwen3_vl_folder, PICTURE, "uint8")
    floats = patches_of(qwen3_vl_folder, PICTURE, "float32")
    video = patches_of(qwen3_vl_folder, CLIP, "uint8")
    t, h, w = pixels.grid_thw
    different = [
        PICTURE,
        MediaItem("image", patches=pixels),
        MediaItem("image", patches=replace(pixels, data=bytes(len(pixels.data)))),
        MediaItem("image", patches=replace(pixels, grid_thw=(t, w, h))),
        MediaItem("image", patches=floats),
        MediaItem("image", patches=replace(floats, normalized=False)),
        MediaItem("video", patches=video),
        MediaItem("video", patches=replace(video, second_per_grid_t=1.0)),
    ]
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        layouts = layouts_of(await encode(encoder, *different))
        assert len({layout.content_hash for layout in layouts.values()}) == len(different)
        (again,) = layouts_of(await encode(encoder, different[1])).values()
        assert again.content_hash == layouts[1].content_hash
