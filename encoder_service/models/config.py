"""The vision part of a checkpoint's config.json, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedding_transport.checkpoint import CheckpointError

# No released config.json states the base of the vision rotary embedding; this is the families' constant.
_DEFAULT_ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class VisionConfig:
    """What all towers have in common; sizes in elements, patch sides in pixels (in frames along time)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    hidden_act: str
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches merged into one token."""
        return self.spatial_merge_size**2

    @property
    def patch_width(self) -> int:
        """Pixel values in one patch row, C * T * P * P."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Qwen3VLVisionConfig(VisionConfig):
    """num_position_embeddings: entries of the square position table; deepstack_visual_indexes: ascending layers."""

    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def positions_per_side(self) -> int:
        return math.isqrt(self.num_position_embeddings)


@dataclass(frozen=True)
class Qwen2_5VLVisionConfig(VisionConfig):
    """window_size: side of an attention window in pixels; fullatt_block_indexes: layers that see a whole frame."""

    window_size: int
    fullatt_block_indexes: frozenset[int]

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


def qwen3_vl_config(config: Mapping[str, Any]) -> Qwen3VLVisionConfig:
    """Reads config.json of a Qwen3-VL checkpoint, dense or MoE.

    Raises:
        CheckpointError: a field is missing or makes no sense.
    """
    vision = _vision_section(config)
    deepstack = tuple(_integers(vision, "deepstack_visual_indexes"))
    num_position_embeddings = _integer(vision, "num_position_embeddings")
    parsed = Qwen3VLVisionConfig(
        **_shared_fields(vision),
        num_position_embeddings=num_position_embeddings,
        deepstack_visual_indexes=deepstack,
    )
    if math.isqrt(num_position_embeddings) ** 2 != num_position_embeddings:
        raise CheckpointError(f"num_position_embeddings is {num_position_embeddings}, expected a square number")
    # transformers emits the layers as it meets them, so only ascending indexes have one meaning.
    if list(deepstack) != sorted(set(deepstack)) or any(not 0 <= index < parsed.depth for index in deepstack):
        raise CheckpointError(
            f"deepstack_visual_indexes are {list(deepstack)}, expected ascending numbers below depth {parsed.depth}"
        )
    return parsed


def qwen2_5_vl_config(config: Mapping[str, Any]) -> Qwen2_5VLVisionConfig:
    """Reads config.json of a Qwen2.5-VL checkpoint.

    Raises:
        CheckpointError: a field is missing or makes no sense.
    """
    vision = _vision_section(config)
    parsed = Qwen2_5VLVisionConfig(
        **_shared_fields(vision),
        window_size=_integer(vision, "window_size"),
        fullatt_block_indexes=frozenset(_integers(vision, "fullatt_block_indexes")),
    )
    if parsed.window_tokens < 1:
        raise CheckpointError(
            f"window_size {parsed.window_size} is smaller than a merged token of "
            f"{parsed.patch_size * parsed.spatial_merge_size} pixels"
        )
    return parsed


def _vision_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise CheckpointError("config.json has no vision_config: this is not a vision-language checkpoint")
    return vision


def _shared_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    # Released Qwen2.5-VL checkpoints write in_chans, all others in_channels.
    channels = "in_channels" if "in_channels" in vision else "in_chans"
    fields: dict[str, Any] = {
        "depth": _integer(vision, "depth"),
        "hidden_size": _integer(vision, "hidden_size"),
        "intermediate_size": _integer(vision, "intermediate_size"),
        "num_heads": _integer(vision, "num_heads"),
        "hidden_act": str(_field(vision, "hidden_act")),
        "in_channels": _integer(vision, channels),
        "patch_size": _integer(vision, "patch_size"),
        "temporal_patch_size": _integer(vision, "temporal_patch_size"),
        "spatial_merge_size": _integer(vision, "spatial_merge_size"),
        "out_hidden_size": _integer(vision, "out_hidden_size"),
        "rope_theta": float((vision.get("rope_parameters") or {}).get("rope_theta", _DEFAULT_ROPE_THETA)),
    }
    # Half of a head turns with the row, half with the column, in pairs.
    if fields["hidden_size"] % (4 * fields["num_heads"]):
        raise CheckpointError(
            f"vision hidden_size {fields['hidden_size']} does not split into {fields['num_heads']} heads of 4n elements"
        )
    return fields


def _field(vision: Mapping[str, Any], name: str) -> Any:
    if name not in vision:
        raise CheckpointError(f"vision_config in config.json has no {name}")
    return vision[name]


def _integer(vision: Mapping[str, Any], name: str) -> int:
    value = _field(vision, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"vision_config.{name} is {value!r}, expected a positive integer")
    return value


def _integers(vision: Mapping[str, Any], name: str) -> list[int]:
    value = _field(vision, name)
    if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
        raise CheckpointError(f"vision_config.{name} is {value!r}, expected a list of integers")
    return value
