"""Decodes videos by PyAV: the container's data first, the sampled frames later. No other file imports PyAV."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import av
import av.container
import av.video.stream
import numpy as np
from av.stream import Disposition

from vitrine_vlm.encoder_service.decoding.file_length import is_truncated
from vitrine_vlm.encoder_service.decoding.media_decoder import Pixels, VideoHeader
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.errors import MediaTooLarge, MediaTruncated, NotAVideo

# Containers that hold their own data. FFmpeg also reads playlists, whose files and URLs it would open.
_CONTAINERS = "mov,matroska,avi,gif,mpegts"
_FALLBACK_FPS = 24.0
# Phones write up to eight, most of them metadata; each takes memory, whatever is in it.
_MAX_STREAMS = 64
# In all frames, sampled or not: 9 minutes of 1920x1080 pixels at 30 frames a second.
_MAX_DECODED_PIXELS = 32 * 1024**3
# Frames decoded at once, each of which holds memory of its own.
_MAX_THREADS = 4


def open_video(data: bytes, limits: MediaLimits) -> VideoHeader:
    """Reads number of frames, rate and size of a video.

    The number of frames is the container's where it equals that of its packets (MP4, MOV, GIF: nothing is decoded for
    it); otherwise the video is decoded once to count them (WebM, or edit lists that drop frames).

    Raises:
        NotAVideo: the container is not one of the above, or has no video stream, or a codec that is not supported.
        MediaTruncated: the file ends too early or is damaged.
        MediaTooLarge: too many frames, or too many pixels in one or in all.
    """
    if is_truncated(data):
        raise MediaTruncated(f"the video file ends too early, after {len(data)} bytes: send the whole file")
    with _open(data, limits) as (container, stream):
        fps = float(stream.average_rate or 0) or _FALLBACK_FPS
        declared = stream.frames
        num_pixels = stream.width * stream.height
        _check_num_frames(declared, num_pixels, limits)
        first = next(container.decode(stream), None)
        if first is None:
            raise NotAVideo("the video holds no frame")
        quarter_turns = round(first.rotation / 90) % 4
    sideways = quarter_turns % 2 == 1
    is_declared = declared and _count_packets(data, limits) == declared
    return VideoHeader(
        height=first.width if sideways else first.height,
        width=first.height if sideways else first.width,
        fps=fps,
        num_frames=declared if is_declared else _count_decoded(data, limits),
        quarter_turns=quarter_turns,
    )


def decode_video(data: bytes, header: VideoHeader, indices: Sequence[int], limits: MediaLimits) -> Iterator[Pixels]:
    """Decodes up to the last of `indices` (ascending) and yields those frames: [height, width, 3], uint8, upright.

    Raises:
        MediaTruncated: the video ends, or can't be decoded, before the last of `indices`.
    """
    with _open(data, limits) as (container, stream):
        wanted = iter(indices)
        next_wanted = next(wanted, None)
        for index, frame in enumerate(container.decode(stream)):
            if index == next_wanted:
                # Turned counter-clockwise, as `rotation`.
                stored_HWC = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                pixels_HWC = np.ascontiguousarray(np.rot90(stored_HWC, header.quarter_turns))
                while index == next_wanted:
                    yield pixels_HWC
                    next_wanted = next(wanted, None)
            if next_wanted is None:
                return
    raise MediaTruncated(f"the video ends before frame {next_wanted} of {header.num_frames}: send the whole file")


@contextmanager
def _open(
    data: bytes, limits: MediaLimits
) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """Opens the container; each pass does so again, as not every container can be rewound."""
    opened = False
    try:
        options = {"format_whitelist": _CONTAINERS, "max_streams": str(_MAX_STREAMS)}
        with av.open(io.BytesIO(data), "r", options=options, metadata_errors="ignore") as container:
            # A cover picture is a video stream, too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise NotAVideo("the file has no video stream: send a video, or send it as an image or audio")
            stream = streams[0]
            if getattr(stream, "codec_context", None) is None:  # None for unknown codecs, despite its type
                raise NotAVideo("the video's codec is not known here: send H.264, H.265, VP8, VP9 or AV1")
            num_pixels = stream.width * stream.height
            if num_pixels > limits.max_pixels:
                raise MediaTooLarge(
                    f"the video has {stream.width}x{stream.height} pixels: at most {limits.max_pixels} are "
                    "accepted, scale it down"
                )
            # The size may change within the video: the decoder checks it before it allocates. It has twice the
            # limit, as it sees sizes rounded up to whole blocks.
            stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels)}
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = min(len(os.sched_getaffinity(0)) + 1, _MAX_THREADS)
            opened = True
            yield container, stream
    except MemoryError:
        raise
    except av.FFmpegError as error:
        if opened:
            raise MediaTruncated("the video file is damaged or cut short: send the whole file") from error
        raise NotAVideo(f"{len(data)} bytes that are no video: send MP4, MOV, WebM, AVI or GIF") from error


def _count_packets(data: bytes, limits: MediaLimits) -> int:
    """The number of frames in the container's packets, without decoding any."""
    num_frames = 0
    with _open(data, limits) as (container, stream):
        for num_packets, packet in enumerate(container.demux(stream)):
            _check_num_frames(num_packets, 0, limits)
            num_frames += packet.size > 0 and not packet.is_discard
    return num_frames


def _count_decoded(data: bytes, limits: MediaLimits) -> int:
    """The number of frames, by decoding all of them."""
    num_frames = 0
    with _open(data, limits) as (container, stream):
        for frame in container.decode(stream):
            num_frames += 1
            _check_num_frames(num_frames, frame.width * frame.height, limits)
    return num_frames


def _check_num_frames(num_frames: int, num_pixels: int, limits: MediaLimits) -> None:
    """
    Args:
        num_pixels: of a frame.
    """
    if num_frames > limits.max_frames:
        raise MediaTooLarge(f"a video of {num_frames} frames or more: at most {limits.max_frames} are accepted")
    if num_frames * num_pixels > _MAX_DECODED_PIXELS:
        raise MediaTooLarge(
            f"a video of {num_frames} frames or more of {num_pixels} pixels: at most {_MAX_DECODED_PIXELS} pixels are "
            "decoded in all, send a shorter or smaller one"
        )
