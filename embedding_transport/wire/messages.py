"""Conversion between protobuf messages and the values of `types`; everything from the wire is checked here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcPool
from vitrine_vlm.embedding_transport.pools.pool import PROBE_NBYTES, ExportPool
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
from vitrine_vlm.embedding_transport.wire.frame_lists import add_frames
from vitrine_vlm.errors import InternalError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import (
    NO_OPTIONS,
    ExpectedTime,
    ItemTimings,
    Layout,
    MediaItem,
    MediaKind,
    MediaOptions,
    ModelIdentity,
    Patches,
)

# Far above any real model.
_MAX_ROW_WIDTH = 2**22
_MAX_MS = 1e9
_MAX_EXPECTED_S = 1e6
_MAX_HASH_NBYTES = 64

_KIND_TO_PROTO: dict[MediaKind, encoder_pb2.MediaKind.ValueType] = {
    "image": encoder_pb2.MEDIA_KIND_IMAGE,
    "video": encoder_pb2.MEDIA_KIND_VIDEO,
}


def item_to_proto(item: MediaItem) -> encoder_pb2.MediaItem:
    message = encoder_pb2.MediaItem(
        kind=_KIND_TO_PROTO[item.kind], video_fps=item.options.fps or 0.0, options=_options_to_proto(item.options)
    )
    if item.data is not None:
        message.data = item.data
    elif item.url is not None:
        message.url = item.url
    elif item.frames is not None:
        add_frames(message.frames, item.frames)
    elif item.patches is not None:
        _write_patches(item.patches, message.patches)
    elif item.ticket is not None:
        message.ticket = item.ticket.value
    return message


def needed_minor_version(item: MediaItem) -> int:
    """The protocol's first minor version whose encoders understand all of an item."""
    options = item.options
    if item.frames is not None or (options != NO_OPTIONS and replace(options, fps=None) != NO_OPTIONS):
        return 2
    return 1 if item.patches is not None or item.ticket is not None else 0


def options_to_fields(options: MediaOptions) -> dict[str, Any]:
    """The fields of a message of options, by their names in both protocols; `fps` is a field of the item."""
    return {name: value for name, value in vars(options).items() if name != "fps" and value is not None}


def options_from_message(message: Message, fps: float) -> MediaOptions:
    """The options in a message of either protocol; unchecked. fps: 0 for none."""
    fields = message.ListFields()
    if not fields and not fps:
        return NO_OPTIONS
    return MediaOptions(fps=fps or None, **{field.name: value for field, value in fields})


def _options_to_proto(options: MediaOptions) -> encoder_pb2.MediaOptions | None:
    """The message, or None where nothing is in it: an item without options stays as older encoders know it."""
    fields = options_to_fields(options) if options != NO_OPTIONS else {}
    return encoder_pb2.MediaOptions(**fields) if fields else None


def _write_patches(patches: Patches, message: encoder_pb2.Patches) -> None:
    """Fills the message in place: a message of its own would be copied, and patches are large."""
    message.data = patches.data
    message.dtype = patches.dtype
    message.normalized = patches.normalized
    message.grid_thw[:] = patches.grid_thw
    message.timestamps_s[:] = patches.timestamps_s
    message.second_per_grid_t = patches.second_per_grid_t


def describe_identity(description: encoder_pb2.DescribeResponse) -> ModelIdentity:
    """Returns the identity in a description.

    Raises:
        InternalError: the dtype is unknown, or the rows have no width or an absurd one.
    """
    num_parts = 1 + len(description.deepstack_visual_indexes)
    if not 1 <= description.out_hidden_size * num_parts <= _MAX_ROW_WIDTH:
        raise InternalError(f"the encoder's rows have {num_parts} times {description.out_hidden_size} elements")
    if description.dtype not in DTYPES:
        raise InternalError(f"the encoder's dtype is {description.dtype!r}; supported are {', '.join(DTYPES)}")
    return ModelIdentity(
        model=description.model,
        revision=description.revision,
        model_type=description.model_type,
        out_hidden_size=description.out_hidden_size,
        deepstack_visual_indexes=tuple(description.deepstack_visual_indexes),
        dtype=description.dtype,
        protocol_version=description.protocol_version,
    )


def describe(identity: ModelIdentity, **fields: Any) -> encoder_pb2.DescribeResponse:
    """The inverse of `describe_identity`; `fields` are the other fields of the message."""
    return encoder_pb2.DescribeResponse(
        protocol_version=identity.protocol_version,
        model=identity.model,
        revision=identity.revision,
        model_type=identity.model_type,
        out_hidden_size=identity.out_hidden_size,
        deepstack_visual_indexes=identity.deepstack_visual_indexes,
        dtype=identity.dtype,
        **fields,
    )


def layout_from_proto(message: encoder_pb2.Layout, item: MediaItem, merge_size: int) -> Layout:
    """Returns an item's layout.

    Raises:
        InternalError: grid, number of tokens and timestamps do not agree, a time is no time, or the content hash is
            longer than any, as it is kept.
    """
    if len(message.grid_thw) != 3 or merge_size < 1:
        raise InternalError(f"layout with grid {list(message.grid_thw)} and merge_size {merge_size}")
    t, h, w = message.grid_thw
    num_tokens = t * (h // merge_size) * (w // merge_size)
    if min(t, h, w) < 1 or h % merge_size or w % merge_size or num_tokens != message.num_tokens:
        raise InternalError(f"layout of {message.num_tokens} tokens with grid {(t, h, w)} and merge_size {merge_size}")
    if item.kind == "video" and len(message.timestamps_s) != t:
        raise InternalError(f"layout of a video with {len(message.timestamps_s)} timestamps and grid {(t, h, w)}")
    times_s = (*message.timestamps_s, message.second_per_grid_t)
    if not all(math.isfinite(time_s) and time_s >= 0 for time_s in times_s):
        raise InternalError("layout with times that are negative or not finite")
    if len(message.content_hash) > _MAX_HASH_NBYTES:
        raise InternalError(f"layout with a content hash of {len(message.content_hash)} bytes")
    return Layout(
        kind=item.kind,
        grid_thw=(t, h, w),
        num_tokens=num_tokens,
        timestamps_s=tuple(message.timestamps_s),
        second_per_grid_t=message.second_per_grid_t,
        content_hash=message.content_hash,
        expected=_expected_from_proto(message),
    )


def _expected_from_proto(message: encoder_pb2.Layout) -> ExpectedTime | None:
    """None for what is no time: it only says where an item should go."""
    queue_s, encode_s = message.queue_s, message.encode_s
    if not (0 <= queue_s <= _MAX_EXPECTED_S and 0 <= encode_s <= _MAX_EXPECTED_S) or queue_s + encode_s == 0:
        return None
    return ExpectedTime(queue_s, encode_s)


def layout_to_proto(item_index: int, layout: Layout) -> encoder_pb2.Layout:
    expected = layout.expected or ExpectedTime(0.0, 0.0)
    return encoder_pb2.Layout(
        item_index=item_index,
        grid_thw=layout.grid_thw,
        num_tokens=layout.num_tokens,
        timestamps_s=layout.timestamps_s,
        second_per_grid_t=layout.second_per_grid_t,
        content_hash=layout.content_hash,
        ticket=layout.ticket.value if layout.ticket is not None else b"",
        queue_s=expected.queue_s,
        encode_s=expected.encode_s,
    )


def timings_from_proto(message: encoder_pb2.ItemTimings, ship_ms: float) -> ItemTimings:
    return ItemTimings(
        load_ms=duration_ms(message.load_ms),
        preprocess_ms=duration_ms(message.preprocess_ms),
        queue_ms=duration_ms(message.queue_ms),
        forward_ms=duration_ms(message.forward_ms),
        export_ms=duration_ms(message.export_ms),
        ship_ms=ship_ms,
    )


def duration_ms(value: float) -> float:
    """Returns a peer's duration, or 0 for what is none: JSON has no NaN, and histograms would keep it for good."""
    return value if 0 <= value <= _MAX_MS else 0.0


def timings_to_proto(timings: ItemTimings) -> encoder_pb2.ItemTimings:
    return encoder_pb2.ItemTimings(
        load_ms=timings.load_ms,
        preprocess_ms=timings.preprocess_ms,
        queue_ms=timings.queue_ms,
        forward_ms=timings.forward_ms,
        export_ms=timings.export_ms,
    )


def offer_to_proto(pool: ExportPool) -> encoder_pb2.Offer:
    """Returns the offer from which a peer can map the pool."""
    probe = {"nbytes": pool.mapped_nbytes, "probe_offset": 0, "probe_nbytes": PROBE_NBYTES}
    if isinstance(pool, CudaIpcPool):
        cuda_ipc = encoder_pb2.CudaIpcPool(handle=pool.handle, gpu_uuid=pool.gpu_uuid, **probe)
        return encoder_pb2.Offer(transport=pool.transport, cuda_ipc=cuda_ipc)
    assert isinstance(pool, ShmPool)
    return encoder_pb2.Offer(transport=pool.transport, shm=encoder_pb2.ShmPool(name=pool.name, **probe))
