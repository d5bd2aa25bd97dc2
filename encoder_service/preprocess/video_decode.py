"""Decodes videos by PyAV: the container's data first, the sampled frames later. No other file imports PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import av
import av.container
import av.video.stream
import torch
from av.stream import Disposition

from vitrine_vlm.encoder_service.decoding.file_length import is_truncated
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.errors import MediaTooLarge, MediaTruncated, NotAVideo

# Containers that hold their own data. FFmpeg also reads playlists, whose files and URLs it would open.
_CONTAINERS = "mov,matroska,avi,gif,mpegts"
_FALLBACK_FPS = 24.0


class EncodedVideo:
    """A video whose number of frames, rate and size are known.

    The number of frames is the container's where it equals that of its packets (MP4, MOV, GIF: nothing is decoded for
    it); otherwise the video is decoded once to count them (WebM, or edit lists that drop frames).

    Raises:
        NotAVideo: the container is not one of the above, or has no video stream, or a codec that is not supported.
        MediaTruncated: the file ends too early or is damaged.
        MediaTooLarge: too many frames, or too many pixels in one.
    """

    def __init__(self, data: bytes, limits: MediaLimits) -> None:
        self._data = data
        self._limits = limits
        if is_truncated(data):
            raise MediaTruncated(f"the video file ends too early, after {len(data)} bytes: send the whole file")
        with self._open() as (container, stream):
            self.fps = float(stream.average_rate or 0) or _FALLBACK_FPS
            declared = stream.frames
            self._check_num_frames(declared)
            first = next(container.decode(stream), None)
            if first is None:
                raise NotAVideo("the video holds no frame")
            self._quarter_turns = round(first.rotation / 90) % 4
        sideways = self._quarter_turns % 2 == 1
        # Upright size, pixels.
        self.height, self.width = (first.width, first.height) if sideways else (first.height, first.width)
        self.num_frames = declared if declared and self._count_packets() == declared else self._count_decoded()

    def frames(self, indices: list[int]) -> Iterator[torch.Tensor]:
        """Decodes up to the last of `indices` (ascending) and yields those frames: [3, height, width], uint8, upright.

        Raises:
            MediaTruncated: the video ends, or can't be decoded, before the last of `indices`.
        """
        with self._open() as (container, stream):
            wanted = iter(indices)
            next_wanted = next(wanted, None)
            for index, frame in enumerate(container.decode(stream)):
                while index == next_wanted:
                    pixels_HWC = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                    if self._quarter_turns:
                        pixels_HWC = torch.rot90(pixels_HWC, self._quarter_turns)  # counter-clockwise, as `rotation`
                    yield pixels_HWC.permute(2, 0, 1)
                    next_wanted = next(wanted, None)
                if next_wanted is None:
                    return
        raise MediaTruncated(f"the video ends before frame {next_wanted} of {self.num_frames}: send the whole file")

    @contextmanager
    def _open(self) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
        """Opens the container; each pass does so again, as not every container can be rewound."""
        opened = False
        try:
            options = {"format_whitelist": _CONTAINERS}
            with av.open(io.BytesIO(self._data), "r", options=options, metadata_errors="ignore") as container:
                # A cover picture is a video stream, too.
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams:
                    raise NotAVideo("the file has no video stream: send a video, or send it as an image or audio")
                stream = streams[0]
                if getattr(stream, "codec_context", None) is None:  # None for unknown codecs, despite its type
                    raise NotAVideo("the video's codec is not known here: send H.264, H.265, VP8, VP9 or AV1")
                num_pixels = stream.width * stream.height
                if num_pixels > self._limits.max_pixels:
                    raise MediaTooLarge(
                        f"the video has {stream.width}x{stream.height} pixels: at most {self._limits.max_pixels} are "
                        "accepted, scale it down"
                    )
                # The size may change within the video: the decoder checks it before it allocates. It has twice the
                # limit, as it sees sizes rounded up to whole blocks.
                stream.codec_context.options = {"max_pixels": str(2 * self._limits.max_pixels)}
                stream.thread_type = "AUTO"
                opened = True
                yield container, stream
        except av.FFmpegError as error:
            if opened:
                raise MediaTruncated("the video file is damaged or cut short: send the whole file") from error
            raise NotAVideo(f"{len(self._data)} bytes that are no video: send MP4, MOV, WebM, AVI or GIF") from error

    def _count_packets(self) -> int:
        """The number of frames in the container's packets, without decoding any."""
        with self._open() as (container, stream):
            return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))

    def _count_decoded(self) -> int:
        """The number of frames, by decoding all of them."""
        num_frames = 0
        with self._open() as (container, stream):
            for _ in container.decode(stream):
                num_frames += 1
                self._check_num_frames(num_frames)
        return num_frames

    def _check_num_frames(self, num_frames: int) -> None:
        if num_frames > self._limits.max_frames:
            raise MediaTooLarge(
                f"a video of {num_frames} frames or more: at most {self._limits.max_frames} are accepted"
            )
