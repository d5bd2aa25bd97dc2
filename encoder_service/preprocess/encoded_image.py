"""An image whose header has been read and whose pixels are decoded on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vitrine_vlm.encoder_service.decoding.media_decoder import MediaDecoder
from vitrine_vlm.encoder_service.decoding.work import DecodeWork, image_work
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess import nvjpeg


class EncodedImage:
    """
    Attributes:
        header: what is known of the image; height, width: upright, pixels.

    Raises:
        NotAnImage, MediaTruncated, MediaTooLarge: see `image_decode.open_image`.
    """

    def __init__(self, data: bytes, limits: MediaLimits, decoder: MediaDecoder) -> None:
        self._data = data
        self.header = decoder.open_image(data, limits)
        self.height, self.width = self.header.height, self.header.width

    @property
    def decode_work(self) -> DecodeWork:
        """What decoding its pixels takes."""
        return image_work(self.header, len(self._data))

    @property
    def suits_nvjpeg(self) -> bool:
        """Whether it is a JPEG that nvJPEG can decode, and nvJPEG is there."""
        return self.header.is_plain_jpeg and nvjpeg.has_nvjpeg()

    @contextmanager
    def pixels(self, device: torch.device, decoder: MediaDecoder) -> Iterator[torch.Tensor]:
        """The decoded pixels, valid in the context only: [3, height, width], uint8, any strides, on `device`; upright.

        Any thread may call it, several at once and again.

        Raises:
            MediaTruncated, NotAnImage: see `image_decode.decode_image`.
        """
        with decoder.image_pixels(self._data, self.header) as pixels_HWC:
            yield torch.from_numpy(pixels_HWC).permute(2, 0, 1).to(device)


def decode_on_gpu(images: Sequence[EncodedImage], device: torch.device) -> list[torch.Tensor]:
    """Decodes images that suit nvJPEG in one call: the pixels of each, [3, height, width], uint8, upright.

    Raises:
        RuntimeError: nvJPEG cannot decode one of them.
    """
    decoded = nvjpeg.decode([image._data for image in images], device)
    return [upright(pixels, image.header.orientation) for pixels, image in zip(decoded, images, strict=True)]


def upright(pixels_CHW: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turns stored pixels upright, by the EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        pixels_CHW = pixels_CHW.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels_CHW.flip(flipped) if flipped else pixels_CHW
