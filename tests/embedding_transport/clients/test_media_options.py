"""Which option counts where several are given: the part's, the request's, the checkpoint's."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import ValidationError

from vitrine_vlm.embedding_transport.clients.media_options import (
    ImageOptions,
    Layer,
    MediaIoKwargs,
    ProcessorKwargs,
    RequestOptions,
    VideoOptions,
    media_options,
    override,
    part_layer,
)
from vitrine_vlm.embedding_transport.clients.media_url import media_item
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaKind, MediaOptions


def request(processor: dict[str, Any] | None = None, video: dict[str, Any] | None = None) -> RequestOptions:
    return RequestOptions(
        ProcessorKwargs.model_validate(processor or {}), MediaIoKwargs.model_validate({"video": video or {}})
    )


def part(inside: dict[str, Any], beside: dict[str, Any], kind: MediaKind) -> Layer:
    types = ImageOptions if kind == "image" else VideoOptions
    return part_layer(types.model_validate(inside), types.model_validate(beside), "url", "part")


@pytest.mark.parametrize(
    ("kind", "inside", "beside", "processor", "video", "expected"),
    [
        ("image", {}, {}, {}, {}, MediaOptions()),
        ("image", {"max_pixels": 5}, {"min_pixels": 4}, {}, {}, MediaOptions(4, 5)),
        ("image", {}, {}, {"max_pixels": 5, "fps": 2, "num_frames": None}, {"fps": 1}, MediaOptions(max_pixels=5)),
        ("image", {"max_pixels": 5}, {"max_pixels": 5}, {"max_pixels": 9, "min_pixels": 3}, {}, MediaOptions(3, 5)),
        ("image", {"size": {"longest_edge": 5}}, {}, {"size": {"shortest_edge": 3}}, {}, MediaOptions(3, 5)),
        ("image", {}, {}, {"max_pixels": 9, "images_kwargs": {"size": {"longest_edge": 5}}}, {}, MediaOptions(None, 5)),
        ("image", {}, {}, {"max_pixels": 9, "videos_kwargs": {"max_pixels": 5}}, {}, MediaOptions(None, 9)),
        ("video", {}, {}, {"max_pixels": 9, "videos_kwargs": {"max_pixels": 5}}, {}, MediaOptions(None, 5)),
        ("video", {}, {}, {"fps": 2, "do_sample_frames": True}, {"num_frames": -1}, MediaOptions(fps=2, sampled=True)),
        ("video", {}, {}, {}, {"num_frames": 8}, MediaOptions(num_frames=8)),
        ("video", {}, {}, {}, {"num_frames": 8, "fps": 2}, MediaOptions(fps=2, max_frames=8)),
        ("video", {}, {}, {"fps": 2}, {"fps": 2}, MediaOptions(fps=2)),
        ("video", {"nframes": 4}, {}, {"fps": 2, "max_frames": 9}, {}, MediaOptions(num_frames=4)),
        ("video", {"nframes": 4}, {}, {"max_pixels": 7}, {}, MediaOptions(None, 7, num_frames=4)),
        ("video", {"nframes": 4, "max_frames": 9}, {}, {}, {}, MediaOptions(num_frames=4, max_frames=9)),
        ("video", {"fps": 4}, {}, {"num_frames": 9}, {}, MediaOptions(fps=4)),
        ("video", {"fps": 4}, {"max_frames": 3}, {"do_sample_frames": False}, {}, MediaOptions(fps=4, max_frames=3)),
        ("video", {"max_frames": 3}, {}, {"fps": 2}, {}, MediaOptions(fps=2, max_frames=3)),
        ("video", {"nframes": 4}, {"num_frames": 4.0}, {}, {}, MediaOptions(num_frames=4)),
        ("video", {"video_start": 1, "video_end": 2.5}, {}, {}, {}, MediaOptions(start_s=1, end_s=2.5)),
    ],
)  # fmt: skip
def test_the_part_counts_before_the_request(
    kind: MediaKind,
    inside: dict[str, Any],
    beside: dict[str, Any],
    processor: dict[str, Any],
    video: dict[str, Any],
    expected: MediaOptions,
) -> None:
    layer = override(next(request(processor, video).layers([kind])), part(inside, beside, kind))
    assert media_options(kind, layer) == expected


@pytest.mark.parametrize(
    ("inside", "beside", "processor", "video", "param"),
    [
        ({"max_pixels": 5}, {"max_pixels": 6}, {}, {}, "part.max_pixels"),
        ({"max_pixels": 5, "size": {"longest_edge": 6}}, {}, {}, {}, "part.url.size.longest_edge"),
        ({"nframes": 5}, {"num_frames": 6}, {}, {}, "part.num_frames"),
        ({"fps": 5}, {"nframes": 6}, {}, {}, "part.url.fps"),
        ({"min_pixels": 5}, {"max_pixels": 4}, {}, {}, "part.max_pixels"),
        ({"max_pixels": 4}, {}, {"min_pixels": 5}, {}, "part.url.max_pixels"),
        ({"video_start": 4, "video_end": 3}, {}, {}, {}, "part.url.video_end"),
        ({}, {"nframes": 10, "max_frames": 9}, {}, {}, "part.max_frames"),
        ({}, {"nframes": 3, "min_frames": 4}, {}, {}, "part.nframes"),
        ({"min_frames": 3}, {}, {"do_sample_frames": False}, {}, "part.url.min_frames"),
        ({}, {}, {"fps": 1}, {"fps": 2}, "media_io_kwargs.video.fps"),
        ({}, {}, {"fps": 1}, {"num_frames": 2}, "mm_processor_kwargs.fps"),
        ({}, {}, {"fps": [1, 2]}, {}, "mm_processor_kwargs.fps"),
        ({}, {}, {"num_frames": 2, "do_sample_frames": False}, {}, "mm_processor_kwargs.do_sample_frames"),
    ],
)
def test_contradictions_are_refused_where_they_stand(
    inside: dict[str, Any], beside: dict[str, Any], processor: dict[str, Any], video: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        media_options(
            "video", override(next(request(processor, video).layers(["video"])), part(inside, beside, "video"))
        )
    assert caught.value.param == param and str(caught.value).startswith(f"{param}: ")


@pytest.mark.parametrize(
    "kwargs",
    [{"max_frame_count": 8}, {"do_resize": False}, {"size": {"height": 5}}, {"images_kwargs": {"fps": 2}}, {"fps": []},
     {"fps": "2"}, {"max_pixels": True}, {"num_frames": 0}, {"cap_pixels_per_frame": True}, {"patch_size": 14}],
    ids=str,
)  # fmt: skip
def test_what_would_change_pixels_otherwise_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProcessorKwargs.model_validate(kwargs)


def test_a_rate_for_each_video() -> None:
    kinds: list[MediaKind] = ["video", "image", "video"]
    for given, expected in (([1, 2.5], [1, None, 2.5]), ([3], [3, None, 3]), (3, [3, None, 3])):
        layers = request({"fps": given}).layers(kinds)
        assert [media_options(kind, layer).fps for kind, layer in zip(kinds, layers, strict=True)] == expected


JPEGS = [b"\xff\xd8first", b"\xff\xd8second"]
LISTED = "data:video/jpeg;base64," + ",".join(base64.b64encode(each).decode() for each in JPEGS)


def test_lists_of_frames() -> None:
    frames = tuple(MediaItem("image", data=each) for each in JPEGS)
    assert media_item("video", LISTED, {}) == MediaItem("video", frames=frames)
    urls = ["http://a/0.png", f"DATA:;base64,{base64.b64encode(JPEGS[1]).decode()}"]
    expected = (MediaItem("image", url=urls[0]), frames[1])
    given: Layer = {"fps": (4.0, "part.fps"), "sampled": (False, "p")}
    assert media_item("video", urls, given) == MediaItem(
        "video", frames=expected, options=MediaOptions(fps=4.0, sampled=False)
    )
    with pytest.raises(BadRequest, match="not base64"):
        media_item("image", LISTED, {})


@pytest.mark.parametrize(
    ("source", "layer", "param", "message"),
    [
        (LISTED, {"num_frames": (4, "p.num_frames")}, "p.num_frames", "all frames of a list are used"),
        (LISTED, {"sampled": (True, "p.sampled")}, "p.sampled", "all frames of a list are used"),
        (LISTED + ",!", {}, None, "frame 2: "),
        ("data:video/jpeg;base64," + "," * MAX_LISTED_FRAMES, {}, None, f"at most {MAX_LISTED_FRAMES}"),
        ([], {}, None, "0 frames"),
        (["http://a"] * (MAX_LISTED_FRAMES + 1), {}, None, f"give 1 to {MAX_LISTED_FRAMES}"),
        ("data:video/jpeg;base64", {}, None, "no comma"),
    ],
)
def test_lists_that_cannot_be(source: str | list[str], layer: Layer, param: str | None, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        media_item("video", source, layer)
    assert caught.value.param == param
