"""Grids and pixels of images against transformers' processors: its torch backend, equal bit for bit (which is stricter
than one grey level), and its Pillow backend."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.encoder_service.preprocess import reference
from tests.encoder_service.preprocess.samples import IMAGE_CONFIGS, encode, photo, png_rgb16, settings
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor

PHOTO = photo(151, 100)
ALPHA = Image.fromarray(np.linspace(0, 255, 151 * 100).reshape(100, 151).astype(np.uint8))


def _with_alpha(mode: str) -> Image.Image:
    image = PHOTO.convert(mode)
    image.putalpha(ALPHA)
    return image


def _palette_with_transparency() -> bytes:
    return encode(PHOTO.quantize(64), transparency=bytes(range(0, 256, 4)))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _png_exif_last() -> bytes:
    data = encode(PHOTO, exif=_exif(5))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    return data[:start] + data[end:-12] + data[start:end] + data[-12:]  # 12 bytes of IEND stay last


KINDS: dict[str, bytes] = {
    "jpeg": encode(PHOTO, "JPEG"),
    "jpeg progressive": encode(PHOTO, "JPEG", progressive=True, subsampling=2),
    "jpeg grey": encode(PHOTO.convert("L"), "JPEG"),
    "jpeg cmyk": encode(PHOTO.convert("CMYK"), "JPEG"),
    **{f"jpeg exif {turn}": encode(PHOTO, "JPEG", exif=_exif(turn)) for turn in range(1, 9)},
    "png": encode(PHOTO),
    "png grey": encode(PHOTO.convert("L")),
    "png grey and alpha": encode(_with_alpha("L")),
    "png rgba": encode(_with_alpha("RGB")),
    "png 1 bit": encode(PHOTO.convert("1")),
    "png palette": encode(PHOTO.quantize(200)),
    "png palette 4 colours": encode(PHOTO.quantize(4), bits=2),
    "png palette with transparency": _palette_with_transparency(),
    "png colour key": encode(PHOTO, transparency=PHOTO.getpixel((3, 4))),
    "png exif": encode(PHOTO, exif=_exif(6)),
    "png exif behind the pixels": _png_exif_last(),
    "webp exif": encode(PHOTO, "WEBP", exif=_exif(8)),
    "webp": encode(PHOTO, "WEBP"),
    "webp lossless alpha": encode(_with_alpha("RGB"), "WEBP", lossless=True),
    "gif": encode(PHOTO, "GIF"),
    "gif animated": encode(PHOTO, "GIF", save_all=True, append_images=[photo(151, 100, seed) for seed in (1, 2)]),
    "webp animated": encode(PHOTO, "WEBP", save_all=True, append_images=[photo(151, 100, 1)]),
    "png animated": encode(PHOTO, save_all=True, append_images=[photo(151, 100, 1)]),
    "bmp": encode(PHOTO, "BMP"),
    "tiff": encode(PHOTO, "TIFF"),
    "tiff lzw": encode(PHOTO, "TIFF", compression="tiff_lzw"),
    "tiff cmyk": encode(PHOTO.convert("CMYK"), "TIFF"),
    "tiff turned": encode(PHOTO, "TIFF", tiffinfo={274: 6}),
    "avif": encode(PHOTO, "AVIF"),
}  # fmt: skip

SIZES = [
    (451, 300),
    (300, 451),
    (64, 64),
    (8, 8),
    (1, 1),
    (1, 200),
    (2000, 10),
    (599, 3),
    (640, 427),
    (33, 47),
    (1411, 900),
]


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _open(folder: Path, family: str, config: dict[str, Any], data: bytes) -> Any:
    return Preprocessor(settings(folder, family, config), MediaLimits()).open("image", data)


def _assert_equals_torch_backend(opened: Any, config: dict[str, Any], image: Image.Image) -> None:
    expected = reference.image_processor(config)(images=[image], return_tensors="pt")
    assert [list(opened.layout.grid_thw)] == expected["image_grid_thw"].tolist()
    assert opened.layout.num_tokens == expected["image_grid_thw"].prod() // 4
    patches = opened.patches()
    assert patches.dtype == torch.float32 and patches.is_contiguous()
    assert torch.equal(patches, expected["pixel_values"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_torch_backend(tmp_path: Path, family: str, kind: str) -> None:
    image = Image.open(io.BytesIO(KINDS[kind]))
    opened = _open(tmp_path, family, IMAGE_CONFIGS[family], KINDS[kind])
    # Turned upright first: transformers does so when it loads an image, before its processor.
    _assert_equals_torch_backend(opened, IMAGE_CONFIGS[family], ImageOps.exif_transpose(image))


def test_turned_images_are_turned(tmp_path: Path, family: str) -> None:
    config = IMAGE_CONFIGS[family]
    grids = {kind: _open(tmp_path, family, config, data).layout.grid_thw for kind, data in KINDS.items()}
    wide, turned = grids["png"], (1, grids["png"][2], grids["png"][1])
    for kind in ("jpeg exif 5", "jpeg exif 8", "png exif", "png exif behind the pixels", "webp exif", "tiff turned"):
        assert grids.pop(kind) == turned != wide
    assert grids["jpeg exif 4"] == wide


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_equals_the_torch_backend(tmp_path: Path, family: str, size: tuple[int, int]) -> None:
    image = photo(*size)
    _assert_equals_torch_backend(
        _open(tmp_path, family, IMAGE_CONFIGS[family], encode(image)), IMAGE_CONFIGS[family], image
    )


@pytest.mark.parametrize("size", [(451, 300), (64, 64), (1200, 10), (10, 1200)], ids=str)
@pytest.mark.parametrize("bounds", [(3136, 20_000), (400_000, 500_000), (65536, 65536)], ids=str)
def test_pixel_bounds_equal_the_torch_backend(
    tmp_path: Path, family: str, size: tuple[int, int], bounds: tuple[int, int]
) -> None:
    image = photo(*size)
    config = IMAGE_CONFIGS[family] | {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}
    config = {name: value for name, value in config.items() if name not in ("min_pixels", "max_pixels")}
    _assert_equals_torch_backend(_open(tmp_path, family, config, encode(image)), config, image)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(tmp_path: Path, family: str, image_format: str) -> None:
    grey = PHOTO.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    opened = _open(tmp_path, family, IMAGE_CONFIGS[family], encode(deep, image_format))
    _assert_equals_torch_backend(opened, IMAGE_CONFIGS[family], grey)


def test_16_bit_rgb_is_scaled(tmp_path: Path, family: str) -> None:
    opened = _open(tmp_path, family, IMAGE_CONFIGS[family], png_rgb16(np.asarray(PHOTO).astype(np.uint16) * 257))
    _assert_equals_torch_backend(opened, IMAGE_CONFIGS[family], PHOTO)


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (512, 512), (1280, 720), (200, 120), (640, 427)], ids=str)
def test_pillow_backend_is_near(tmp_path: Path, family: str, size: tuple[int, int]) -> None:
    image = photo(*size)
    config = IMAGE_CONFIGS[family]
    opened = _open(tmp_path, family, config, encode(image))
    expected = Qwen2VLImageProcessorPil(**config)(images=[image], return_tensors="pt")
    assert [list(opened.layout.grid_thw)] == expected["image_grid_thw"].tolist()
    # Back to grey levels: a row holds channels one after the other.
    std = torch.tensor(config["image_std"]).repeat_interleave(expected["pixel_values"].shape[1] // 3)
    levels = (opened.patches() - expected["pixel_values"]).abs() * std * 255
    assert levels.mean() <= 0.25
