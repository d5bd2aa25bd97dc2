"""vLLM's requests, as far as the connector reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Elem:
    data: Any


@dataclass(frozen=True)
class Place:
    offset: int
    length: int
    num_embeds: int | None = None

    def get_num_embeds(self) -> int:
        return self.length if self.num_embeds is None else self.num_embeds


@dataclass(frozen=True)
class Feature:
    identifier: str
    mm_position: Place
    data: Mapping[str, Elem] | None = None
    modality: str = "image"
    mm_hash: str | None = None


@dataclass(frozen=True)
class Request:
    request_id: str
    mm_features: list[Feature] = field(default_factory=list)
    ec_transfer_params: Mapping[str, Any] | None = None
    cache_salt: str | None = None


def pixels(grid_thw: tuple[int, int, int] = (1, 4, 4), width: int = 12, seed: int = 0) -> dict[str, Elem]:
    """An image as vLLM's processor leaves it, by default: pixels that are not normalized."""
    t, h, w = grid_thw
    values = torch.randint(0, 256, (t * h * w, width), generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": Elem(values.to(torch.uint8)), "image_grid_thw": Elem(torch.tensor(grid_thw))}


def plain(identifier: str, offset: int, length: int = 4) -> Feature:
    """An item that vLLM's own tower could encode."""
    return Feature(identifier, Place(offset, length), pixels())


def metadata(identifier: str, offset: int, length: int = 4) -> Feature:
    """An item without pixels."""
    return Feature(identifier, Place(offset, length), {"image_grid_thw": Elem(torch.tensor((1, 4, 4)))})


def ticket(**changed: Any) -> dict[str, Any]:
    """What a gateway sends along for an item."""
    return {"ticket": "ab" * 16, "encoder_id": "e", "kind": "image", "num_tokens": 4, "tenant": "t", **changed}
