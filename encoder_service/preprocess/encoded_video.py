"""Videos whose headers have been read and whose frames are decoded on demand: a file, or a list of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from vitrine_vlm.encoder_service.decoding.media_decoder import MediaDecoder
from vitrine_vlm.encoder_service.decoding.work import DecodeWork, video_work
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.encoded_image import EncodedImage
from vitrine_vlm.errors import MediaError

_CPU = torch.device("cpu")


class OpenedVideo(Protocol):
    """A video whose number of frames, rate (frames per second) and upright size (pixels) are known."""

    num_frames: int
    fps: float
    height: int
    width: int

    def frames(self, indices: list[int], decoder: MediaDecoder) -> Iterator[torch.Tensor]:
        """Decodes these frames, ascending: [3, height, width], uint8, upright, each valid until the next one.

        Raises:
            MediaTruncated, NotAnImage, NotAVideo: the pixels turn out to be damaged.
        """
        ...

    def work(self, indices: list[int]) -> DecodeWork:
        """What decoding these frames takes."""
        ...


class EncodedVideo:
    """A video file.

    Raises:
        NotAVideo, MediaTruncated, MediaTooLarge: see `video_decode.open_video`.
    """

    def __init__(self, data: bytes, limits: MediaLimits, decoder: MediaDecoder) -> None:
        self._data = data
        self._limits = limits
        self._header = decoder.open_video(data, limits)
        self.num_frames, self.fps = self._header.num_frames, self._header.fps
        self.height, self.width = self._header.height, self._header.width

    def frames(self, indices: list[int], decoder: MediaDecoder) -> Iterator[torch.Tensor]:
        """See `OpenedVideo`."""
        for pixels_HWC in decoder.video_frames(self._data, self._header, indices, self._limits):
            yield torch.from_numpy(pixels_HWC).permute(2, 0, 1)

    def work(self, indices: list[int]) -> DecodeWork:
        """See `OpenedVideo`."""
        return video_work(self._header, num_decoded=indices[-1] + 1, num_sampled=len(indices))


class EncodedFrames:
    """A list of pictures, one a frame.

    Args:
        files: the encoded pictures, at least one.
        fps: the rate at which they were taken.

    Raises:
        NotAnImage, MediaTruncated, MediaTooLarge: see `EncodedImage`; the message names the frame.
        MediaError: their sizes differ.
    """

    def __init__(self, files: Sequence[bytes], limits: MediaLimits, fps: float, decoder: MediaDecoder) -> None:
        self.fps = fps
        self.num_frames = len(files)
        self._images: list[EncodedImage] = []
        for index, file in enumerate(files):
            try:
                self._images.append(EncodedImage(file, limits, decoder))
            except MediaError as error:
                raise type(error)(f"frame {index}: {error}") from error
            image, first = self._images[-1], self._images[0]
            if (image.width, image.height) != (first.width, first.height):
                raise MediaError(
                    f"frame {index}: it has {image.width}x{image.height} pixels, the first frame "
                    f"{first.width}x{first.height}: send frames of one size"
                )
        self.height, self.width = self._images[0].height, self._images[0].width

    def frames(self, indices: list[int], decoder: MediaDecoder) -> Iterator[torch.Tensor]:
        """See `OpenedVideo`."""
        for index in indices:
            try:
                with self._images[index].pixels(_CPU, decoder) as pixels_CHW:
                    yield pixels_CHW
            except MediaError as error:
                raise type(error)(f"frame {index}: {error}") from error

    def work(self, indices: list[int]) -> DecodeWork:
        """See `OpenedVideo`."""
        each = [self._images[index].decode_work for index in indices]
        return DecodeWork("video", sum(work.seconds for work in each), max(work.nbytes for work in each))
