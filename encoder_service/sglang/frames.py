"""The ZMQ messages that SGLang's receivers read: frame 0 is a pickled EmbeddingData, frame 1 the rows of its items.

Errors are frame 0 alone. The rows of all items of a part lie one behind the other, each row with its main embedding
first and its deepstack layers behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, TypeAlias

import torch

from vitrine_vlm.encoder_service.sglang.pickle_frame import EnumMember, Global, Value, pickled_object
from vitrine_vlm.encoder_service.sglang.versions import ReceiverClass
from vitrine_vlm.errors import BadRequest, InternalError, MediaError, VitrineError
from vitrine_vlm.types import Layout

Frame: TypeAlias = bytes | memoryview
Modality: TypeAlias = Literal["IMAGE", "VIDEO", "AUDIO"]

_MODALITY_ENUM = Global("sglang.srt.managers.schedule_batch", "Modality")
_MODALITIES: dict[Modality, int] = {"IMAGE": 1, "VIDEO": 2, "AUDIO": 3}


@dataclass(frozen=True)
class PartId:
    """One part of a request: the items of one modality that fell to one encoder.

    req_id: of the part, chosen by SGLang. part_idx: its place among the `num_parts` parts of the request.
    """

    req_id: str
    num_parts: int
    part_idx: int
    modality: Modality


def rows_message(
    receiver: ReceiverClass, part: PartId, layouts: Sequence[Layout], rows_TW: torch.Tensor
) -> list[Frame]:
    """Returns the frames of an encoded part.

    Args:
        layouts: of the part's items, in their order.
        rows_TW: the rows of all items, [num_tokens, row_width], contiguous in host memory. The frame is a view of it.
    """
    dtype = Global("torch", str(rows_TW.dtype).removeprefix("torch."))
    state: dict[str, Value] = {
        "grid_dim": [list(layout.grid_thw) for layout in layouts],
        "dtype": dtype,
        "shape": list(rows_TW.shape),
        "error_msg": None,
        "error_code": None,
    }
    if part.modality == "VIDEO":  # each family's receiver reads one of the two
        state["video_timestamps"] = [list(layout.timestamps_s) for layout in layouts]
        state["second_per_grid_ts"] = [layout.second_per_grid_t for layout in layouts]
    rows = memoryview(rows_TW.view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
    return [_header(receiver, part, state), rows]


def error_message(receiver: ReceiverClass, part: PartId, error: VitrineError) -> list[Frame]:
    """Returns the one frame that ends the part's request with this error."""
    state: dict[str, Value] = {
        "grid_dim": None,
        "dtype": None,
        "shape": None,
        "error_msg": str(error),
        "error_code": http_status(error),
    }
    return [_header(receiver, part, state)]


def http_status(error: VitrineError) -> int:
    """Returns the status for an error. SGLang passes on 400, 500 and 503; others end its requests as if all were well.

    Source: `_handle_abort_finish_reason` in SGLang 0.5.20's tokenizer_manager.py.
    """
    if isinstance(error, BadRequest | MediaError):
        return int(HTTPStatus.BAD_REQUEST)
    return int(HTTPStatus.INTERNAL_SERVER_ERROR if isinstance(error, InternalError) else HTTPStatus.SERVICE_UNAVAILABLE)


def _header(receiver: ReceiverClass, part: PartId, state: dict[str, Value]) -> bytes:
    common: dict[str, Value] = {
        "req_id": part.req_id,
        "num_parts": part.num_parts,
        "part_idx": part.part_idx,
        "modality": EnumMember(_MODALITY_ENUM, _MODALITIES[part.modality]),
    }
    unused: dict[str, Value] = dict.fromkeys(receiver.unused_fields)
    return pickled_object(receiver.name, common | unused | state)
