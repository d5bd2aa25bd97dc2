"""The fields of parts that are images or videos, as `request_fields.py` has those of whole requests."""

from __future__ import annotations

from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable, honoured, informative, refused

FRAMES = "frames of a video are sampled by `video_url.fps`"
MEDIA_ARE_BYTES = "media are known by their bytes"
SIZES = "pictures are sized as the checkpoint's processor says"

_SIZE_FIELDS: FieldTable = {
    name: refused(note=SIZES)
    for name in ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "max_long_side_pixel")
} | {name: refused(note=SIZES) for name in ("min_dynamic_patch", "max_dynamic_patch")}
_FRAME_FIELDS: FieldTable = {
    name: refused(note=FRAMES)
    for name in ("nframes", "num_frames", "min_frames", "max_frames", "video_start", "video_end", "sample_fps")
} | {name: refused(note=FRAMES) for name in ("max_tokens_per_frame", "max_image_tokens")}

IMAGE_URL: FieldTable = {
    "url": honoured("`https:`, `http:`, `data:`, and `file:` below the encoders' allowed folder"),
    "detail": informative(str, note=SIZES),
    "content_hash": informative(str, note=MEDIA_ARE_BYTES),
    **_SIZE_FIELDS,
}
VIDEO_URL: FieldTable = {
    "url": IMAGE_URL["url"],
    "fps": honoured("frames a second that are looked at; the checkpoint's own rate where left out"),
    "detail": IMAGE_URL["detail"],
    "content_hash": IMAGE_URL["content_hash"],
    **_SIZE_FIELDS,
    **_FRAME_FIELDS,
}
_PART: FieldTable = {
    "type": honoured("`text`, `image_url` or `video_url`"),
    "text": refused(note="of a `text` part"),
    "image_url": refused(note="of an `image_url` part"),
    "video_url": refused(note="of a `video_url` part"),
    "uuid": informative(str, note=MEDIA_ARE_BYTES),
    "modalities": refused("image", note="pictures are pictures"),
    "prompt_cache_breakpoint": informative(note="the prefix cache works without"),
    "fps": refused(note="inside `video_url`"),
    **_SIZE_FIELDS,
    **_FRAME_FIELDS,
}
TEXT_PART: FieldTable = {**_PART, "text": honoured("of a `text` part")}
IMAGE_PART: FieldTable = {**_PART, "image_url": honoured("of an `image_url` part", inside=IMAGE_URL)}
VIDEO_PART: FieldTable = {**_PART, "video_url": honoured("of a `video_url` part", inside=VIDEO_URL)}
MEDIA_PARTS = {"image_url": IMAGE_PART, "video_url": VIDEO_PART}
