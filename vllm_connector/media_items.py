"""The items that the connector sends to encoders: the patches of a plain request, or the ticket of a gateway's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.types import MediaItem, Patches, Ticket
from vitrine_vlm.vllm_connector.vllm_types import Feature

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_EMBEDDINGS = {"image": "image_embeds", "video": "video_embeds"}
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
_DTYPES = {
    torch.uint8: "uint8",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class TicketParams(BaseModel):
    """One value of `ec_transfer_params`, whose key is the item's uuid."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    ticket: str = Field(pattern="^[0-9a-f]{32}$")
    encoder_id: str = Field(min_length=1, max_length=256)
    kind: Literal["image", "video"]
    num_tokens: int = Field(gt=0)
    tenant: str = Field("", max_length=1024)

    def item(self) -> MediaItem:
        return MediaItem(kind=self.kind, ticket=Ticket(self.encoder_id, bytes.fromhex(self.ticket)))


def ticket_params(feature: Feature, params: Mapping[str, Any] | None) -> TicketParams | None:
    """Returns the ticket of an item, or None if the request has none for it.

    Raises:
        BadRequest: the request's parameters for this item are malformed, or are of another item.
    """
    found = (params or {}).get(feature.mm_hash or feature.identifier)
    if found is None:
        return None
    try:
        ticket = TicketParams.model_validate(found)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise BadRequest(f"ec_transfer_params of {feature.identifier}: {problems}") from error
    needed = (feature.modality, feature.mm_position.get_num_embeds())
    if (ticket.kind, ticket.num_tokens) != needed:
        raise BadRequest(
            f"ec_transfer_params of {feature.identifier}: {ticket.kind} of {ticket.num_tokens} tokens, the prompt has "
            f"{needed[0]} of {needed[1]}"
        )
    return ticket


def needs_tower(feature: Feature) -> bool:
    """Whether the item is an image or video whose embeddings are not in the request itself."""
    if feature.modality not in _PIXELS:
        return False
    return not isinstance(_field(feature, _EMBEDDINGS[feature.modality]), torch.Tensor)


def has_pixels(feature: Feature) -> bool:
    """Whether vLLM has preprocessed the item, so that its own tower can encode it."""
    pixels = _field(feature, _PIXELS.get(feature.modality, ""))
    return isinstance(pixels, torch.Tensor)


def check_grid(feature: Feature, merge_size: int) -> None:
    """Checks the grid of an item whose sender gave vLLM no pixels: vLLM computes positions from it, and ends the engine
    where they are not as many as the item's tokens.

    Raises:
        BadRequest: it is none of an image or video with these tokens.
    """
    if feature.modality not in _GRIDS or feature.data is None or has_pixels(feature):
        return
    grid, num_tokens = _field(feature, _GRIDS[feature.modality]), feature.mm_position.get_num_embeds()
    sides = [] if grid is None else torch.as_tensor(grid).flatten().tolist()
    if (
        len(sides) != 3
        or min(sides) < 1
        or any(side % merge_size for side in sides[1:])
        or (feature.modality == "image" and sides[0] != 1)
        or math.prod(sides) != num_tokens * merge_size**2
    ):
        raise BadRequest(
            f"item {feature.identifier}: no {feature.modality} of {num_tokens} tokens has a grid of {sides} patches"
        )


def patches_item(feature: Feature, normalized: bool) -> MediaItem:
    """Returns the item as patches. Copies them.

    Args:
        normalized: whether vLLM's processor has scaled and normalized them.

    Raises:
        BadRequest: the item has no pixels, or they have a dtype that encoders do not take.
    """
    pixels = _field(feature, _PIXELS.get(feature.modality, ""))
    grid = _field(feature, _GRIDS.get(feature.modality, ""))
    if not isinstance(pixels, torch.Tensor) or pixels.dtype not in _DTYPES or grid is None:
        raise BadRequest(f"item {feature.identifier} of kind {feature.modality!r} has no pixels that an encoder takes")
    t, h, w = (int(side) for side in torch.as_tensor(grid).flatten().tolist())
    timestamps, interval = _field(feature, "timestamps"), _field(feature, "second_per_grid_ts")
    patches = Patches(
        data=pixels.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(),
        dtype=_DTYPES[pixels.dtype],
        normalized=normalized,
        grid_thw=(t, h, w),
        timestamps_s=() if timestamps is None else tuple(torch.as_tensor(timestamps).flatten().tolist()),
        second_per_grid_t=0.0 if interval is None else float(interval),
    )
    return MediaItem(kind="image" if feature.modality == "image" else "video", patches=patches)


def _field(feature: Feature, name: str) -> Any:
    field = (feature.data or {}).get(name)
    return None if field is None else field.data
