"""Converts between the encoder's protobuf messages and plain values, and checks what peers send."""

from __future__ import annotations

from collections.abc import Iterator

from vitrine_vlm.embedding_transport.shipping.exporter import ExporterStats
from vitrine_vlm.embedding_transport.wire.frame_list_url import frames_of_url
from vitrine_vlm.embedding_transport.wire.frame_lists import frames_from_message, next_file
from vitrine_vlm.embedding_transport.wire.messages import describe, options_from_message
from vitrine_vlm.encoder_service.engine.cache import CacheStats
from vitrine_vlm.encoder_service.preprocess.given_patches import PATCH_DTYPES
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.encoder_service.tickets import TicketTable
from vitrine_vlm.errors import BadRequest, Overloaded, VitrineError
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import (
    PROTOCOL_MINOR_VERSION,
    MediaItem,
    MediaKind,
    ModelIdentity,
    Patches,
    Ticket,
)

# Characters of a tenant or session_id.
_MAX_NAME_LENGTH = 1024
# Of an error, which may name what the request has; as much as a call's own error may have.
_MAX_MESSAGE_LENGTH = 2048
# The patches of one time take more bytes than this in any model.
_LEAST_NBYTES_OF_TIME = 256

_KINDS: dict[int, MediaKind] = {
    encoder_pb2.MEDIA_KIND_IMAGE: "image",
    encoder_pb2.MEDIA_KIND_VIDEO: "video",
}


def check_names(request: encoder_pb2.EncodeRequest) -> None:
    """
    Raises:
        BadRequest: tenant or session_id are longer than any is. They are hashed, and named in errors, for each item.
    """
    for name, value in (("tenant", request.tenant), ("session_id", request.session_id)):
        if len(value) > _MAX_NAME_LENGTH:
            raise BadRequest(f"{name} has {len(value)} characters: at most {_MAX_NAME_LENGTH} are accepted")


def item_from_proto(index: int, message: encoder_pb2.MediaItem, files: Iterator[bytes] | None = None) -> MediaItem:
    """The item at `index` of a request.

    Args:
        files: those that came in pieces, from this item's on.

    Raises:
        BadRequest: no kind, no source, patches whose grid is not three numbers or with more times than can be, no
            frames or too many, or options of patches or a ticket. What patches and options hold is checked when the
            item is opened.
    """
    if message.kind not in _KINDS:
        raise BadRequest(f"item {index} has kind {message.kind}: give MEDIA_KIND_IMAGE or MEDIA_KIND_VIDEO")
    source = message.WhichOneof("source")
    if source is None:
        raise BadRequest(f"item {index} has no source: give url, data, frames, patches or a ticket")
    if message.HasField("options") and source in ("patches", "ticket"):
        raise BadRequest(
            f"item {index} is given as {source} and has options: they would change nothing, leave them out"
        )
    kind = _KINDS[message.kind]
    if source == "frames" and kind == "image":
        raise BadRequest(f"item {index} is an image and has frames: send them as a video")
    if source == "url" and (frames := frames_of_url(kind, message.url)) is not None:
        return MediaItem(kind, frames=frames, options=options_from_message(message.options, message.video_fps))
    data = message.data if source == "data" else None
    if source == "data_nbytes":
        data = next_file(f"item {index}", files)
    return MediaItem(
        kind=kind,
        url=message.url if source == "url" else None,
        data=data,
        frames=frames_from_message(f"item {index}", message.frames, files) if source == "frames" else None,
        options=options_from_message(message.options, message.video_fps),
        patches=_patches_from_proto(index, message.patches) if source == "patches" else None,
        # Whose tickets these are is not in the message: they were sent to the encoder that they are of.
        ticket=Ticket("", message.ticket) if source == "ticket" else None,
    )


def _patches_from_proto(index: int, message: encoder_pb2.Patches) -> Patches:
    if len(message.grid_thw) != 3:
        raise BadRequest(f"item {index} has patches with a grid of {len(message.grid_thw)} numbers: give t, h and w")
    num_times = len(message.timestamps_s)
    if num_times * _LEAST_NBYTES_OF_TIME > len(message.data):  # before millions of them become objects
        raise BadRequest(f"item {index} has {num_times} timestamps and {len(message.data)} bytes of patches")
    t, h, w = message.grid_thw
    return Patches(
        data=message.data,
        dtype=message.dtype,
        normalized=message.normalized,
        grid_thw=(t, h, w),
        timestamps_s=tuple(message.timestamps_s),
        second_per_grid_t=message.second_per_grid_t,
    )


def failed_to_proto(item_index: int, error: VitrineError) -> encoder_pb2.EncodeResponse:
    """The answer for an item that could not be encoded."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    message = str(error)[:_MAX_MESSAGE_LENGTH]
    failed = encoder_pb2.Failed(item_index=item_index, code=error.code, message=message, retry_after_s=retry_after_s)
    return encoder_pb2.EncodeResponse(failed=failed)


def describe_to_proto(
    identity: ModelIdentity,
    settings: ProcessorSettings,
    transports: tuple[str, ...],
    max_items: int,
    tickets: TicketTable,
    gpu_uuids: tuple[str, ...] = (),
) -> encoder_pb2.DescribeResponse:
    """The answer to Describe."""
    return describe(
        identity,
        processor=encoder_pb2.ProcessorSettings(
            patch_size=settings.patch_size,
            temporal_patch_size=settings.temporal_patch_size,
            merge_size=settings.merge_size,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            video_min_pixels=settings.video_min_pixels,
            video_max_pixels=settings.video_max_pixels,
            video_fps=settings.video_fps,
            video_min_frames=settings.video_min_frames,
            video_max_frames=settings.video_max_frames,
            image_mean=settings.image_mean,
            image_std=settings.image_std,
        ),
        transports=transports,
        max_items=max_items,
        gpu_uuids=gpu_uuids,
        protocol_minor_version=PROTOCOL_MINOR_VERSION,
        instance_id=tickets.encoder_id,
        ticket_ttl_s=tickets.ttl_s,
        patch_dtypes=PATCH_DTYPES,
    )


def stats_to_proto(
    queue_s: float, cache: CacheStats, exporter: ExporterStats, tickets: TicketTable
) -> encoder_pb2.GetStatsResponse:
    """The answer to GetStats. queue_s: seconds of work that are admitted."""
    return encoder_pb2.GetStatsResponse(
        queue_seconds=queue_s,
        num_cache_hits=cache.hits,
        num_cache_joined=cache.joined,
        num_cache_misses=cache.misses,
        cache_gpu_bytes=cache.nbytes["gpu"],
        cache_host_bytes=cache.nbytes["host"],
        num_live_leases=exporter.live_leases,
        shipped_bytes=exporter.shipped_nbytes,
        num_live_tickets=len(tickets),
        ticket_bytes=tickets.nbytes,
    )
