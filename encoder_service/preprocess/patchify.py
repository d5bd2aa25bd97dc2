"""Turns pixels into rows of patches, by torch alone.

Source: transformers 5.23, `TorchvisionBackend.rescale_and_normalize` (image_processing_backends.py) and `patchify` of
the image and video processors that the families name. torchvision's uint8 resize is `torch.nn.functional.interpolate`
underneath, so results equal that backend's bit for bit, with or without torchvision.

Shapes: F frames, C = 3 channels, H and W pixels, P patches, D = C * temporal_patch_size * patch_size ** 2.
"""

from __future__ import annotations

import torch

from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings


def resize(pixels_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes by antialiased bicubic interpolation to [C, height, width] uint8, on the same device; any strides in.

    On a GPU, where torch resizes floats only, weights are not rounded as on the CPU: pixels differ by one grey level.
    """
    if pixels_CHW.shape[-2:] == (height, width):
        return pixels_CHW
    if pixels_CHW.is_cuda:
        return interpolate(pixels_CHW.float(), height, width).round_().clamp_(0, 255).to(torch.uint8)
    return interpolate(pixels_CHW, height, width)


def interpolate(pixels_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes likewise in the dtype of the input, so that floats may leave the range of pixels."""
    return torch.nn.functional.interpolate(
        pixels_CHW.unsqueeze(0), (height, width), mode="bicubic", antialias=True, align_corners=False
    ).squeeze(0)


def patchify(frames_FCHW: torch.Tensor, settings: ProcessorSettings) -> torch.Tensor:
    """Cuts frames into patches and normalizes them.

    Args:
        frames_FCHW: uint8; F a multiple of `temporal_patch_size`, H and W multiples of `settings.factor`. An image
            comes as one frame expanded to `temporal_patch_size`.

    Returns:
        [P, D], float32, in the order of `cut_patches`.
    """
    return normalize(cut_patches(frames_FCHW, settings), settings)


def cut_patches(frames_FCHW: torch.Tensor, settings: ProcessorSettings) -> torch.Tensor:
    """Cuts frames into patches, [P, D] uint8, in the order in which the tower merges them.

    Rows run over time, merge blocks top to bottom and left to right, then inside a block; a row runs over channel,
    frame, y, x. Any number of frames F that is a multiple of `temporal_patch_size`.
    """
    num_frames, num_channels, height, width = frames_FCHW.shape
    patch, merge, group = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    rows, columns = height // settings.factor, width // settings.factor
    blocks = frames_FCHW.reshape(num_frames // group, group, num_channels, rows, merge, patch, columns, merge, patch)
    # [t, y block, x block, y, x, channel, frame, y, x]
    patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(-1, num_channels * group * patch * patch)


def normalize(patches: torch.Tensor, settings: ProcessorSettings) -> torch.Tensor:
    """Normalizes uint8 patches [P, D] to float32 by the checkpoint's mean and standard deviation of each channel."""
    by_channel = patches.to(torch.float32).view(len(patches), len(settings.image_mean), -1)
    mean = torch.tensor(settings.image_mean, device=patches.device).mul(255.0).view(-1, 1)
    std = torch.tensor(settings.image_std, device=patches.device).mul(255.0).view(-1, 1)
    # Subtract, then divide by 255 * std, as the reference does: another order rounds differently.
    return by_channel.sub_(mean).div_(std).view(len(patches), -1)
