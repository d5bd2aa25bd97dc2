"""The fields of images and videos, and of the options of all of them; `request_fields.py` has the others."""

from __future__ import annotations

from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable, honoured, informative, refused

MEDIA_ARE_BYTES = "media are known by their bytes"
DETAIL = "sizes follow from `min_pixels` and `max_pixels`"
ONE_PLACEHOLDER = "a media item counts as its one placeholder"
_SIZES = "send `min_pixels` and `max_pixels`"
_FRAMES = "send `fps`, `num_frames` or `max_frames`"

_SIZE: FieldTable = {
    "shortest_edge": honoured("another name of `min_pixels`, and no edge"),
    "longest_edge": honoured("another name of `max_pixels`"),
}
IMAGE_OPTIONS: FieldTable = {
    "min_pixels": honoured("least area after resizing, pixels; [of videos](media.md#options)"),
    "max_pixels": honoured("largest area after resizing, likewise"),
    "size": honoured("`shortest_edge` and `longest_edge`, transformers' names of both", inside=_SIZE),
}
_RATE: FieldTable = {
    "fps": honoured("frames sampled per second; of a list of frames, the rate at which they were taken"),
    "num_frames": honoured("frames sampled in all, instead of `fps`"),
    "min_frames": honoured("least number of frames sampled by `fps`"),
    "max_frames": honoured("largest number of frames sampled by `fps`"),
}
VIDEO_OPTIONS: FieldTable = {
    **IMAGE_OPTIONS,
    **_RATE,
    "nframes": honoured("another name of `num_frames`"),
    "video_start": honoured("where the part begins that is looked at, seconds"),
    "video_end": honoured("where it ends, seconds"),
}
_OTHER_SIZES: FieldTable = {
    name: refused(note=_SIZES)
    for name in (
        *("total_pixels", "resized_height", "resized_width", "max_long_side_pixel"),
        *("min_dynamic_patch", "max_dynamic_patch"),
    )
}
_OTHER_FRAMES: FieldTable = {
    name: refused(note=_FRAMES) for name in ("sample_fps", "raw_fps", "max_tokens_per_frame", "max_image_tokens")
}
_OF_VIDEOS: FieldTable = {name: refused(note="of a video") for name in VIDEO_OPTIONS if name not in IMAGE_OPTIONS}

IMAGE_URL: FieldTable = {
    "url": honoured("`https:`, `http:`, `data:`, and `file:` below the encoders' allowed folder"),
    "detail": informative(str, note=DETAIL),
    "content_hash": informative(str, note=MEDIA_ARE_BYTES),
    **_OF_VIDEOS,
    **_OTHER_SIZES,
    **_OTHER_FRAMES,
    **IMAGE_OPTIONS,
}
VIDEO_URL: FieldTable = {**IMAGE_URL, **VIDEO_OPTIONS}
_PART: FieldTable = {
    "type": honoured("`text`, `image_url`, `video_url` or `video`"),
    "text": refused(note="of a `text` part"),
    "image_url": refused(note="of an `image_url` part"),
    "video_url": refused(note="of a `video_url` part"),
    "video": refused(note="of a `video` part"),
    "uuid": informative(str, note=MEDIA_ARE_BYTES),
    "modalities": refused("image", "multi-images", "video", note="the same to these models"),
    "prompt_cache_breakpoint": informative(note="the prefix cache works without"),
    **_OF_VIDEOS,
    **{name: refused(note="of a picture or video") for name in IMAGE_OPTIONS},
    **_OTHER_SIZES,
    **_OTHER_FRAMES,
}
TEXT_PART: FieldTable = {**_PART, "text": honoured("of a `text` part")}
IMAGE_PART: FieldTable = {
    **_PART,
    "image_url": honoured("of an `image_url` part", inside=IMAGE_URL),
    **IMAGE_OPTIONS,
}
VIDEO_PART: FieldTable = {
    **_PART,
    "video_url": honoured("of a `video_url` part", inside=VIDEO_URL),
    **VIDEO_OPTIONS,
}
FRAMES_PART: FieldTable = {
    **_PART,
    "video": honoured("of a `video` part: a list of its frames' URLs, or the URL of a video"),
    **VIDEO_OPTIONS,
}
MEDIA_PARTS = {"image_url": IMAGE_PART, "video_url": VIDEO_PART, "video": FRAMES_PART}

_USUAL: FieldTable = {
    name: honoured("only `true`") for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
}
_IMAGES_KWARGS: FieldTable = {**IMAGE_OPTIONS, **_USUAL}
_VIDEOS_KWARGS: FieldTable = {
    **IMAGE_OPTIONS,
    **_RATE,
    "fps": honoured("frames sampled per second; one for all videos, or a list with one for each"),
    "do_sample_frames": honoured("`false` takes every frame"),
    **_USUAL,
    "cap_pixels_per_frame": honoured("only `false`"),
}
PROCESSOR_KWARGS: FieldTable = {
    **_VIDEOS_KWARGS,
    "images_kwargs": honoured("of images alone", inside=_IMAGES_KWARGS),
    "videos_kwargs": honoured("of videos alone", inside=_VIDEOS_KWARGS),
}
VIDEO_IO: FieldTable = {
    "num_frames": honoured(
        "frames sampled; beside `fps` the largest number of them; `-1` for the processor's own number"
    ),
    "fps": _RATE["fps"],
}
MEDIA_IO_KWARGS: FieldTable = {
    "video": honoured("of videos", inside=VIDEO_IO),
    "image": honoured("only `{}`"),
    "audio": honoured("only `{}`"),
}
# Of a whole request.
MEDIA_OPTIONS: FieldTable = {
    "mm_processor_kwargs": honoured(
        "[options](media.md#options) of all media; unknown names are refused", inside=PROCESSOR_KWARGS
    ),
    "media_io_kwargs": honoured("likewise, in vLLM's form", inside=MEDIA_IO_KWARGS),
}
