"""Checks the options of an item, which come from the wire, before anything is computed from them."""

from __future__ import annotations

import math

from vitrine_vlm.errors import MediaError
from vitrine_vlm.types import MediaKind, MediaOptions

# A rate does nothing to an image; some callers send one with every item.
_OF_IMAGES = ("min_pixels", "max_pixels", "fps")
_OF_LISTS = (*_OF_IMAGES, "sampled")
_COUNTS = ("min_pixels", "max_pixels", "num_frames", "min_frames", "max_frames")


def check_options(kind: MediaKind, options: MediaOptions, *, is_list: bool = False) -> None:
    """
    Args:
        is_list: whether it is a video that comes as a list of frames, none of which is left out.

    Raises:
        MediaError: a value that is no size, number, rate or time, options that contradict each other, or one that an
            item of this kind does not have.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    _check_kind(given, kind, is_list)
    for name in _COUNTS:
        if given.get(name, 1) < 1:
            raise MediaError(f"{name} is {given[name]}: give 1 or more, or leave it out for the checkpoint's own")
    fps = options.fps
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"video_fps is {fps}: give a positive number, or none for the model's default")
    for name in ("start_s", "end_s"):
        if not math.isfinite(given.get(name, 0.0)) or given.get(name, 0.0) < 0:
            raise MediaError(f"{name} is {given[name]}: give seconds from the video's start")
    if (names := options.contradiction(is_list=is_list)) is not None:
        raise MediaError(f"{names[0]} {given[names[0]]} and {names[1]} {given[names[1]]} contradict each other")


def _check_kind(given: dict[str, object], kind: MediaKind, is_list: bool) -> None:
    allowed = _OF_IMAGES if kind == "image" else _OF_LISTS
    names = [name for name in given if (kind == "image" or is_list) and name not in allowed]
    if is_list and given.get("sampled"):
        names.append("sampled")
    if names:
        what = "an image has" if kind == "image" else "a list of frames, all of which are used, has"
        raise MediaError(f"{what} no {', '.join(names)}: leave that out")
