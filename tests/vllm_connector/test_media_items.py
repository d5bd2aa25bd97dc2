from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.vllm_connector.vllm_requests import Elem, Feature, Place, metadata, pixels, plain, ticket
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.types import Ticket
from vitrine_vlm.vllm_connector.media_items import has_pixels, needs_tower, patches_item, ticket_params


def test_pixels_become_patches_as_they_are() -> None:
    data = pixels((1, 2, 4), seed=3)
    patches = patches_item(Feature("x", Place(0, 2), data), normalized=False).patches
    assert patches is not None and (patches.dtype, patches.normalized, patches.grid_thw) == ("uint8", False, (1, 2, 4))
    assert patches.data == bytes(data["pixel_values"].data.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalized_patches_keep_their_dtype(dtype: torch.dtype) -> None:
    values = torch.randn(16, 12).to(dtype)
    data = {"pixel_values": Elem(values), "image_grid_thw": Elem(torch.tensor((1, 4, 4)))}
    patches = patches_item(Feature("x", Place(0, 4), data), normalized=True).patches
    assert patches is not None and patches.normalized and f"torch.{patches.dtype}" == str(dtype)
    assert torch.equal(torch.frombuffer(bytearray(patches.data), dtype=dtype).view(16, 12), values)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"timestamps": [0.25, 1.25]}, ((0.25, 1.25), 0.0)),
        ({"timestamps": torch.tensor([0.25, 1.25])}, ((0.25, 1.25), 0.0)),
        ({"second_per_grid_ts": torch.tensor(0.5)}, ((), 0.5)),
        ({"second_per_grid_ts": torch.tensor([0.0])}, ((), 0.0)),
    ],
)
def test_videos_have_their_times(times: dict[str, Any], expected: tuple[tuple[float, ...], float]) -> None:
    data = {
        "pixel_values_videos": Elem(torch.zeros(8, 12, dtype=torch.uint8)),
        "video_grid_thw": Elem(torch.tensor((2, 2, 2))),
    } | {name: Elem(value) for name, value in times.items()}
    item = patches_item(Feature("x", Place(0, 2), data, "video"), normalized=False)
    assert item.kind == "video" and item.patches is not None
    assert (item.patches.timestamps_s, item.patches.second_per_grid_t) == expected


def test_items_without_pixels_are_known() -> None:
    assert has_pixels(plain("x", 0))
    assert not has_pixels(metadata("x", 0))
    assert not has_pixels(Feature("x", Place(0, 4), None))
    with pytest.raises(BadRequest, match="no pixels"):
        patches_item(metadata("x", 0), normalized=False)


def test_what_needs_no_tower_is_left_to_vllm() -> None:
    embeds = {"image_embeds": Elem(torch.zeros(4, 8)), "image_grid_thw": Elem(torch.tensor((1, 4, 4)))}
    assert needs_tower(plain("x", 0)) and needs_tower(metadata("x", 0))
    assert not needs_tower(Feature("x", Place(0, 4), embeds))
    assert not needs_tower(Feature("x", Place(0, 4), {}, modality="audio"))


def test_tickets_are_found_by_the_uuid_whatever_adapter_is_used() -> None:
    feature = Feature("adapter-u", Place(0, 4), None, mm_hash="u")
    params = ticket_params(feature, {"u": ticket(unknown=1)})
    assert params is not None and params.item().ticket == Ticket("e", bytes.fromhex("ab" * 16))
    assert ticket_params(feature, {"other": ticket()}) is None
    assert ticket_params(feature, None) is None


@pytest.mark.parametrize(
    "malformed",
    [
        7,
        {},
        ticket(ticket="ab"),
        ticket(ticket="zz" * 16),
        ticket(kind="audio"),
        ticket(num_tokens=0),
        ticket(encoder_id=""),
        ticket(tenant=None),
        ticket(num_tokens=5),
        ticket(kind="video"),
    ],
)
def test_malformed_parameters_are_the_requests_fault(malformed: object) -> None:
    with pytest.raises(BadRequest, match="ec_transfer_params of x"):
        ticket_params(metadata("x", 0), {"x": malformed})
