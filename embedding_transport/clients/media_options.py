"""The options of media in OpenAI requests: what they are called there, and which one counts where several are given.

An option stands in or beside its part, or for all media of the request in `mm_processor_kwargs` (keyword arguments of
transformers' processor: for all media, or below `images_kwargs` and `videos_kwargs`) and `media_io_kwargs` (vLLM's).
Those of the part count before those of the request, and these before the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictBool

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.json_types import Number, RequestObject, WholeNumber
from vitrine_vlm.types import MediaKind, MediaOptions

_MAX_PIXELS = 2**63 - 1
_MAX_FRAMES = 2**31 - 1


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("give 1 or more, or -1")
    return value


# One for all videos, or a list with one for each.
Rates = Annotated[list[Annotated[Number, Field(gt=0)]], BeforeValidator(_listed), Field(min_length=1)]

# Options of an item by their names in MediaOptions, each with its value and with its place in the request.
Layer: TypeAlias = dict[str, tuple[Any, str]]
_OF_IMAGES = ("min_pixels", "max_pixels")
_OF_LISTS = (*_OF_IMAGES, "fps", "sampled")
# What a number, or a rate, of frames replaces.
_REPLACED = {"num_frames": ("fps", "min_frames", "max_frames", "sampled"), "fps": ("num_frames", "sampled")}


class Size(RequestObject):
    """transformers' name of the bounds on pixels: they are no edges."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shortest_edge: WholeNumber | None = Field(None, ge=1, le=_MAX_PIXELS)
    longest_edge: WholeNumber | None = Field(None, ge=1, le=_MAX_PIXELS)


class ImageOptions(RequestObject):
    """Options in or beside the part of an image."""

    min_pixels: WholeNumber | None = Field(None, ge=1, le=_MAX_PIXELS)
    max_pixels: WholeNumber | None = Field(None, ge=1, le=_MAX_PIXELS)
    size: Size = Size()


class VideoOptions(ImageOptions):
    """Options in or beside the part of a video. Source of the names: qwen-vl-utils 0.0.14, vision_process.py."""

    fps: Number | None = Field(None, gt=0)
    num_frames: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    nframes: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    min_frames: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    max_frames: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    video_start: Number | None = Field(None, ge=0)
    video_end: Number | None = Field(None, ge=0)


class ImagesKwargs(ImageOptions):
    """Those that change pixels in another way must have their usual values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    do_convert_rgb: Literal[True] = True


class VideosKwargs(ImagesKwargs):
    """fps: one for all videos, or a list with one for each."""

    fps: Rates | None = None
    num_frames: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    min_frames: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    max_frames: WholeNumber | None = Field(None, ge=1, le=_MAX_FRAMES)
    do_sample_frames: StrictBool | None = None
    cap_pixels_per_frame: Literal[False] = False


class ProcessorKwargs(VideosKwargs):
    """`mm_processor_kwargs`. Source of the names: the keyword arguments of transformers 5.23's processors."""

    images_kwargs: ImagesKwargs = ImagesKwargs()
    videos_kwargs: VideosKwargs = VideosKwargs()


class _NoOptions(RequestObject):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoIoKwargs(_NoOptions):
    """num_frames: at most as many where `fps` is there, too; -1 leaves their number to the processor."""

    num_frames: Annotated[WholeNumber, AfterValidator(_not_zero)] = Field(-1, ge=-1, le=_MAX_FRAMES)
    fps: Number | None = Field(None, gt=0)


class MediaIoKwargs(_NoOptions):
    """`media_io_kwargs`. Source of the names: vLLM 0.32, vllm/multimodal/media/video.py."""

    video: VideoIoKwargs = VideoIoKwargs()
    image: _NoOptions = _NoOptions()
    audio: _NoOptions = _NoOptions()


@dataclass(frozen=True)
class RequestOptions:
    """The options of all media of a request."""

    processor: ProcessorKwargs
    io: MediaIoKwargs

    def layers(self, kinds: Sequence[MediaKind]) -> Iterator[Layer]:
        """Those of each item of the request.

        Raises:
            BadRequest: they contradict each other, or `fps` is a list of another length than there are videos.
        """
        num_videos = kinds.count("video")
        index = 0
        for kind in kinds:
            yield self._layer(kind, index, num_videos)
            index += kind == "video"

    def _layer(self, kind: MediaKind, index: int, num_videos: int) -> Layer:
        """index: of a video among all videos."""
        where = "mm_processor_kwargs"
        scope = f"{kind}s_kwargs"
        flat = layer_of(self.processor, where)
        scoped = layer_of(getattr(self.processor, scope), f"{where}.{scope}")
        layer = override(flat, scoped)
        if kind == "image":
            return {name: layer[name] for name in _OF_IMAGES if name in layer}
        if "fps" in layer:
            rates, path = layer["fps"]
            if len(rates) not in (1, num_videos):
                raise BadRequest(f"{path}: {len(rates)} rates for {num_videos} videos: give one, or one each", path)
            layer["fps"] = rates[index % len(rates)], path
        return _united(layer, self._io_layer())

    def _io_layer(self) -> Layer:
        io, where = self.io.video, "media_io_kwargs.video"
        layer: Layer = {}
        if io.fps is not None:
            layer["fps"] = io.fps, f"{where}.fps"
        if io.num_frames > 0:
            name = "num_frames" if io.fps is None else "max_frames"
            layer[name] = io.num_frames, f"{where}.num_frames"
        return layer


def layer_of(options: ImageOptions, where: str) -> Layer:
    """The options of one object in the request.

    Args:
        where: its place.

    Raises:
        BadRequest: one option is given by two names, with different values.
    """
    layer: Layer = {}
    for name, path, value in _given(options, where):
        layer = _united(layer, {name: (value, path)})
    return layer


def part_layer(inside: ImageOptions, beside: ImageOptions, key: str, where: str) -> Layer:
    """The options of a part.

    Args:
        inside, beside: those in the object with its URL, and beside it.
        key: the name of that object; where: the part's place.

    Raises:
        BadRequest: they contradict each other.
    """
    return _united(layer_of(inside, f"{where}.{key}"), layer_of(beside, where))


def override(lower: Layer, upper: Layer) -> Layer:
    """Both, where those of `upper` count before those of `lower`, a number of frames before a rate, and so on."""
    replaced = {other for name in upper for other in _REPLACED.get(name, ())}
    return {name: value for name, value in lower.items() if name not in replaced} | upper


def media_options(kind: MediaKind, layer: Layer, *, is_list: bool = False) -> MediaOptions:
    """
    Args:
        is_list: whether it is a video that comes as a list of frames.

    Raises:
        BadRequest: they contradict each other, or frames of a list would be left out.
    """
    options = MediaOptions(**{name: value for name, (value, _) in layer.items()})
    for name, (value, path) in layer.items() if is_list else ():
        if name not in _OF_LISTS or (name == "sampled" and value):
            raise BadRequest(f"{path}: all frames of a list are used: leave it out, or send fewer frames", path)
    if (names := options.contradiction(is_list=is_list)) is not None:
        first, second = (layer[name][1] for name in names)
        raise BadRequest(f"{second}: {layer[names[1]][0]} contradicts {first}, which is {layer[names[0]][0]}", second)
    return options


def _united(one: Layer, other: Layer) -> Layer:
    """Both, of one rank."""
    for name in one.keys() & other.keys():
        (value, path), (other_value, other_path) = one[name], other[name]
        if value != other_value:
            raise BadRequest(
                f"{other_path}: it is {other_value} here and {value} in {path}: give one of them", other_path
            )
    return one | other


_NAMES = {
    "size.shortest_edge": "min_pixels",
    "size.longest_edge": "max_pixels",
    "nframes": "num_frames",
    "video_start": "start_s",
    "video_end": "end_s",
    "do_sample_frames": "sampled",
}
_FIELDS = frozenset(each.name for each in fields(MediaOptions))


def _given(options: ImageOptions, where: str) -> Iterator[tuple[str, str, Any]]:
    """Name in MediaOptions, place and value of each option that is given."""
    flat = {name: getattr(options, name) for name in options.model_fields_set if name != "size"}
    flat |= {f"size.{name}": getattr(options.size, name) for name in options.size.model_fields_set}
    for name, value in sorted(flat.items()):
        own = _NAMES.get(name, name)
        if own in _FIELDS and value is not None:
            yield own, f"{where}.{name}", value
