"""Reads and checks the vision part of a checkpoint's config.json: what all families share, and helpers for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrine_vlm.model_loading.checkpoint import CheckpointError

# No released config.json states the base of the vision rotary embedding; this is the constant of all families.
_DEFAULT_ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class VisionConfig:
    """The fields that all towers share; sizes in elements, patch sides in pixels (in frames along time)."""

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


def vision_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`vision_config` of a model's config.json.

    Raises:
        CheckpointError: there is none.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise CheckpointError("config.json has no vision_config: this is not a vision-language checkpoint")
    return vision


def shared_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `VisionConfig`, by name.

    Raises:
        CheckpointError: one is missing or invalid.
    """
    # Some released checkpoints write in_chans, most in_channels.
    channels = "in_channels" if "in_channels" in vision else "in_chans"
    fields: dict[str, Any] = {
        "depth": integer(vision, "depth"),
        "hidden_size": integer(vision, "hidden_size"),
        "intermediate_size": integer(vision, "intermediate_size"),
        "num_heads": integer(vision, "num_heads"),
        "hidden_act": str(_field(vision, "hidden_act")),
        "in_channels": integer(vision, channels),
        "patch_size": integer(vision, "patch_size"),
        "temporal_patch_size": integer(vision, "temporal_patch_size"),
        "spatial_merge_size": integer(vision, "spatial_merge_size"),
        "out_hidden_size": integer(vision, "out_hidden_size"),
        "rope_theta": float((vision.get("rope_parameters") or {}).get("rope_theta", _DEFAULT_ROPE_THETA)),
    }
    # Half of a head is rotated by the row, half by the column, in pairs.
    if fields["hidden_size"] % (4 * fields["num_heads"]):
        raise CheckpointError(
            f"vision hidden_size {fields['hidden_size']} does not split into {fields['num_heads']} heads of 4n elements"
        )
    return fields


def _field(vision: Mapping[str, Any], name: str) -> Any:
    if name not in vision:
        raise CheckpointError(f"vision_config in config.json has no {name}")
    return vision[name]


def integer(vision: Mapping[str, Any], name: str) -> int:
    """A positive integer of `vision_config`.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = _field(vision, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"vision_config.{name} is {value!r}, expected a positive integer")
    return value


def integers(vision: Mapping[str, Any], name: str) -> list[int]:
    """A list of integers of `vision_config`.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = _field(vision, name)
    if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
        raise CheckpointError(f"vision_config.{name} is {value!r}, expected a list of integers")
    return value
