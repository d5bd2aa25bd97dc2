"""Preprocessing on a GPU gives what the CPU gives, to a grey level or two; turning a tensor upright is Pillow's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.encoder_service.preprocess.samples import QWEN3_IMAGE, QWEN3_VIDEO, settings
from tests.encoder_service.processed import given
from tests.integration.media import clip
from vitrine_vlm.encoder_service.decoding.image_decode import as_stored
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.encoded_image import upright
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tensor_is_turned_as_pillow_turns_a_picture(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    turned = upright(torch.from_numpy(pixels).permute(2, 0, 1), orientation)
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), expected)
    written = np.zeros_like(expected)
    as_stored(written, orientation)[:] = pixels
    assert np.array_equal(written, expected)


def photograph(mode: str, orientation: int = 1) -> bytes:
    """A JPEG of smooth colours, with an EXIF orientation."""
    coarse = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((403, 301), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_jpegs_become_the_same_patches(tmp_path: Path, mode: str, orientation: int) -> None:
    compare(tmp_path, "image", photograph(mode, orientation))


@pytest.mark.gpu
def test_videos_become_the_same_patches(tmp_path: Path) -> None:
    compare(tmp_path, "video", clip(3, 200, 120, 20).data)


@pytest.mark.gpu
def test_jpegs_decoded_together_are_those_decoded_alone(tmp_path: Path) -> None:
    preprocessor = Preprocessor(
        settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO), MediaLimits(), torch.device("cuda")
    )
    files = [photograph(mode, orientation) for mode in ("RGB", "L") for orientation in (1, 6, 7)]
    opened = [preprocessor.open("image", file) for file in files]
    if not all(each.decodes_on_gpu for each in opened):
        pytest.skip("torchvision decodes no JPEG on this GPU")
    alone = [preprocessor.patches_of_batch([each])[0] for each in opened]
    together = preprocessor.patches_of_batch(opened)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))  # type: ignore[arg-type]

    # Scan data that ends early, in a file whose end marker is there: nvJPEG may refuse it, which touches no others.
    damaged = preprocessor.open("image", files[0][: len(files[0]) // 2] + b"\xff\xd9")
    beside = preprocessor.patches_of_batch([opened[0], damaged, opened[1]])
    assert torch.equal(alone[0], beside[0]) and torch.equal(alone[1], beside[2])  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_patches_of_callers_become_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    found = settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO)
    pixels = torch.randint(0, 256, (24, 1536), dtype=torch.uint8).to(dtype)
    patches = given("image", pixels, (1, 4, 6), normalized=False)
    expected = Preprocessor(found, MediaLimits()).open_patches("image", patches).patches()
    on_gpu = Preprocessor(found, MediaLimits(), torch.device("cuda"), torch.bfloat16).open_patches("image", patches)
    assert (on_gpu.patches().device.type, on_gpu.patches().dtype) == ("cuda", torch.bfloat16)
    assert (on_gpu.patches().float().cpu() - expected).abs().max() <= 2**-8


def compare(tmp_path: Path, kind: str, data: bytes) -> None:
    found = settings(tmp_path, "qwen3_vl", QWEN3_IMAGE, QWEN3_VIDEO)
    by_cpu, by_gpu = (Preprocessor(found, MediaLimits(), torch.device(device)) for device in ("cpu", "cuda"))
    on_cpu, on_gpu = (each.open(kind, data) for each in (by_cpu, by_gpu))  # type: ignore[arg-type]
    assert on_gpu.layout == on_cpu.layout
    compare_patches(on_cpu.patches(), on_gpu.patches())
    if on_gpu.decodes_on_gpu:
        [decoded_there] = by_gpu.patches_of_batch([on_gpu])
        assert isinstance(decoded_there, torch.Tensor)
        compare_patches(on_cpu.patches(), decoded_there)


def compare_patches(expected: torch.Tensor, patches: torch.Tensor) -> None:
    assert patches.is_cuda
    # Of pixels scaled to -1..1, where a grey level is 1 / 127.5.
    difference = (patches.cpu() - expected).abs() * 127.5
    assert difference.mean() < 1.0
    assert difference.quantile(0.999) < 8.0
