"""A video that comes as a list of pictures, one a frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.image_decode import EncodedImage
from vitrine_vlm.errors import MediaError

_CPU = torch.device("cpu")


class EncodedFrames:
    """Frames whose headers have been read, with the interface of `EncodedVideo`.

    Args:
        files: the encoded pictures, at least one.
        fps: the rate at which they were taken.

    Raises:
        NotAnImage, MediaTruncated, MediaTooLarge: see `EncodedImage`; the message names the frame.
        MediaError: their sizes differ.
    """

    def __init__(self, files: Sequence[bytes], limits: MediaLimits, fps: float) -> None:
        self.fps = fps
        self.num_frames = len(files)
        self._images: list[EncodedImage] = []
        for index, file in enumerate(files):
            try:
                self._images.append(EncodedImage(file, limits.max_pixels))
            except MediaError as error:
                raise type(error)(f"frame {index}: {error}") from error
            image, first = self._images[-1], self._images[0]
            if (image.width, image.height) != (first.width, first.height):
                raise MediaError(
                    f"frame {index}: it has {image.width}x{image.height} pixels, the first frame "
                    f"{first.width}x{first.height}: send frames of one size"
                )
        self.height, self.width = self._images[0].height, self._images[0].width

    def frames(self, indices: list[int]) -> Iterator[torch.Tensor]:
        """Decodes and yields these frames: [3, height, width], uint8, upright.

        Raises:
            MediaTruncated, NotAnImage: see `EncodedImage.decode`.
        """
        for index in indices:
            try:
                yield self._images[index].decode(_CPU)
            except MediaError as error:
                raise type(error)(f"frame {index}: {error}") from error
