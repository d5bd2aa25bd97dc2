"""Builds an encoder from its configuration and runs it until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from aiohttp import web

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import gpu_uuids
from vitrine_vlm.embedding_transport.pools.shm_pool import remove_stale_pools
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter, export_pools
from vitrine_vlm.embedding_transport.wire.message_bounds import MessageBounds
from vitrine_vlm.encoder_service.codec import describe_to_proto, stats_to_proto
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.decoding.decoder_pool import DecoderPool
from vitrine_vlm.encoder_service.engine.admission import Admission
from vitrine_vlm.encoder_service.engine.batcher import Batcher
from vitrine_vlm.encoder_service.engine.cache import EmbeddingCache
from vitrine_vlm.encoder_service.engine.cost_model import CostModel, measure_cost
from vitrine_vlm.encoder_service.families import Family, build_tower, family_of
from vitrine_vlm.encoder_service.gpu.stats import GpuStats
from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.models import PlainTower, VisionTower
from vitrine_vlm.encoder_service.models.weights import stored_dtype
from vitrine_vlm.encoder_service.preprocess.preprocess_pool import PreprocessPool
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.encoder_service.preprocess.settings import ProcessorSettings
from vitrine_vlm.encoder_service.server import EncoderServer, EncoderServicer, ServiceState
from vitrine_vlm.encoder_service.service import EncodeService
from vitrine_vlm.encoder_service.tickets import TicketTable
from vitrine_vlm.errors import EncoderUnavailable
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.model_loading.loading import LoadingStopped, ProgressLog, choose_device, choose_dtype
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.lifecycle import Lifecycle
from vitrine_vlm.service_runtime.logs import log_at_any_level
from vitrine_vlm.service_runtime.memory import freeze_gc, return_memory_after_peaks
from vitrine_vlm.service_runtime.metrics_port import start_metrics_port
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.types import ModelIdentity

if TYPE_CHECKING:
    from vitrine_vlm.encoder_service.gpu.graphs import GpuTower
    from vitrine_vlm.encoder_service.sglang.port import SglangPort

_log = logging.getLogger(__name__)
# Only for the last answers to be sent: sessions of peers have ended with the exporter.
_STOP_GRACE_S = 0.5
# Where the GPU does the work, further ones, each with a thread, only contend for the interpreter.
_GPU_DECODERS = 8


@dataclass(frozen=True)
class LoadedModel:
    """The vision half of a checkpoint, ready to run.

    gpu_stats: reads the counters of the CUDA graphs; None for a plain tower. gpu_uuids: of `device`; empty on a CPU.
    """

    identity: ModelIdentity
    settings: ProcessorSettings
    tower: VisionTower
    cost: CostModel
    gpu_stats: Callable[[], GpuStats] | None
    device: torch.device
    gpu_uuids: tuple[str, ...]


def load_model(
    config: EncoderConfig,
    must_stop: Callable[[], bool],
    report: Callable[[str, float], None] = lambda stage, part: None,
) -> LoadedModel:
    """Finds the checkpoint and loads its tower, logging the progress. Blocking.

    Args:
        must_stop: once it returns True, loading ends with LoadingStopped.
        report: called with a stage of the start ("weights", "graphs") and the part of it that is done, 0 to 1.

    Raises:
        CheckpointError: no such checkpoint, or one that this encoder cannot serve.
        ValueError: the GPU, or the lack of one, does not allow what was asked for.
    """
    _log.info("opening checkpoint %s", config.model)
    checkpoint = open_checkpoint(config.model, config.revision, config.served_model_name, config.load_format)
    revision = checkpoint.start_hashing()  # while the weights are read
    family = family_of(checkpoint)
    settings = ProcessorSettings.from_checkpoint(checkpoint, family.processor)
    device = choose_device(config.device)
    dtype_name = choose_dtype(config.dtype, device, stored_dtype(checkpoint, family.weights))
    has_fast_form = device.type == "cuda" and dtype_name == "bfloat16"
    if config.quantization == "fp8" and not has_fast_form:
        raise ValueError(f"--quantization fp8 needs bfloat16 on a GPU: this is {dtype_name} on {device.type}")
    progress = ProgressLog("loading visual weights", must_stop, partial(report, "weights"))
    plain = build_tower(checkpoint, device, DTYPES[dtype_name], progress)
    fast = _accelerated(plain, family, config, must_stop, partial(report, "graphs")) if has_fast_form else None
    identity = ModelIdentity(
        model=checkpoint.model,
        revision=revision(),
        model_type=str(checkpoint.config["model_type"]),
        out_hidden_size=plain.out_hidden_size,
        deepstack_visual_indexes=plain.deepstack_visual_indexes,
        dtype=dtype_name,
    )
    _log.info("loaded %s, revision %s, %s on %s", identity.model, identity.revision[:12], dtype_name, device)
    tower = fast or plain
    cost = measure_cost(tower, plain.config.patch_width, device)
    return LoadedModel(identity, settings, tower, cost, fast.stats if fast else None, device, gpu_uuids(device))


def _accelerated(
    plain: PlainTower,
    family: Family,
    config: EncoderConfig,
    must_stop: Callable[[], bool],
    report: Callable[[float], None],
) -> GpuTower:
    from vitrine_vlm.encoder_service.gpu.tower import (
        gpu_tower,  # needs Triton, which comes with torch's CUDA builds only
    )

    max_graph_patches = config.max_batch_patches if config.cuda_graphs else 0
    progress = ProgressLog("capturing CUDA graphs", must_stop, report)
    return gpu_tower(plain, family.fuse, max_graph_patches, progress, fp8=config.quantization == "fp8")


async def serve(config: EncoderConfig) -> None:
    """Listens, loads, serves until SIGTERM or SIGINT, then drains.

    Raises:
        CheckpointError: see `load_model`.
        OSError: a port cannot be listened on.
        TransportUnavailable: a pool could not be allocated.
        ValueError: the media folder does not exist, or a setting of --sglang-port cannot be read.
    """
    limits = config.media_limits()
    metrics, calls, held = EncoderMetrics(), RunningCalls(), ByteBudget(config.max_held_bytes)
    servicer = EncoderServicer(metrics, calls, held, config.max_body_bytes)
    bounds = MessageBounds(held, config.port_limits())
    peer_rules = config.peer_rules(config.tls_client_ca_file is not None)
    server = EncoderServer(servicer, peer_rules, config.port_limits(), [bounds])
    unavailable = lambda message: EncoderUnavailable(f"the encoder {message}")  # noqa: E731
    lifecycle = Lifecycle(server, calls, unavailable, config.drain_timeout_s)
    supervisor = lifecycle.supervisor
    async with AsyncExitStack() as stack:
        stack.push_async_callback(supervisor.close)
        return_memory_after_peaks(held, supervisor)
        # The port answers (NOT_SERVING) before anything slow begins, so that probes see progress, not refusal.
        # It closes last, so that new calls are UNAVAILABLE until then.
        address = await server.start(config.host, config.port, config.server_tls(), config.health_socket)
        addresses = f"grpc={address}"
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        if config.metrics_port:
            address = await start_metrics_port(
                config, config.host, web.Application(), metrics.registry, supervisor, stack
            )
            addresses += f" metrics={address}"
        sglang = _make_sglang_port(config, metrics, lifecycle) if config.sglang_port else None
        if sglang:
            addresses += f" sglang={await sglang.start(stack)}"
        _log.info("LISTENING %s", addresses)
        if config.shm_folder:
            # Before the model is loaded, for which their memory may be needed.
            remove_stale_pools(Path(config.shm_folder))

        try:
            model = await asyncio.to_thread(load_model, config, lambda: lifecycle.is_ending, metrics.show_progress)
        except LoadingStopped:
            lifecycle.raise_failure()
            _log.info("stopped while loading")
            return

        shm_folder = Path(config.shm_folder) if config.shm_folder else None
        pools = export_pools(model.device, config.cuda_ipc_pool_bytes, shm_folder, config.pool_bytes)
        exporter = RowExporter(pools, lease_ttl_s=config.lease_ttl_s, rules=peer_rules)
        stack.push_async_callback(exporter.close)
        exporter.start(supervisor)
        admission = Admission(model.cost, max_patches=config.max_queued_patches, max_s=config.max_queued_s)
        batcher = Batcher(
            model.tower,
            model.cost,
            max_batch_patches=config.max_batch_patches,
            device=model.device,
            on_batch=metrics.observe_batch,
            # Cleaning up is impossible: it would free memory on the lost GPU.
            on_gpu_lost=lambda: supervisor.fail("GPU", None, can_unwind=False),
        )
        stack.push_async_callback(batcher.close)
        batcher.start(supervisor)
        loader = MediaLoader(limits)
        stack.push_async_callback(loader.close)
        cache = EmbeddingCache(gpu_nbytes=config.cache_gpu_bytes, host_nbytes=config.cache_host_bytes)
        stack.push_async_callback(cache.close)
        cache.start(supervisor)
        metrics.watch_cache(cache.stats)
        # Without a cache nothing would be left of them at the claim.
        cache_bytes = config.cache_gpu_bytes if model.device.type == "cuda" else config.cache_host_bytes
        max_ahead = config.compute_ahead if cache_bytes else 0
        tickets = TicketTable(uuid.uuid4().hex, config.ticket_ttl_s, max_ahead=max_ahead)
        stack.push_async_callback(tickets.close)
        tickets.start(supervisor)
        metrics.watch_tickets(lambda: len(tickets), lambda: tickets.nbytes, lambda: tickets.ahead)
        preprocess_device = model.device if config.gpu_preprocess else torch.device("cpu")
        decoders = _make_decoders(config, preprocess_device)
        preprocess_pool = PreprocessPool(
            Preprocessor(model.settings, limits, preprocess_device, DTYPES[model.identity.dtype]),
            decoders,
            revision=model.identity.revision,
        )
        stack.push_async_callback(preprocess_pool.close)
        decoders.start(supervisor)
        preprocess_pool.start(supervisor)
        service = EncodeService(
            loader,
            held,
            preprocess_pool,
            admission,
            batcher,
            cache,
            tickets,
            max_items=config.max_items,
            metrics=metrics,
        )
        metrics.watch_queue(admission, lambda: held.reserved_nbytes, lambda: batcher.waiting_patches)
        metrics.watch_exporter(exporter.stats)
        if model.gpu_stats is not None:
            metrics.watch_gpu(model.gpu_stats)
        description = describe_to_proto(
            model.identity, model.settings, exporter.transports, config.max_items, tickets, model.gpu_uuids
        )
        stats = lambda: stats_to_proto(admission.seconds, cache.stats(), exporter.stats(), tickets)  # noqa: E731
        freeze_gc()
        servicer.open(ServiceState(description, service, exporter, stats, model.identity.row_nbytes))
        if not lifecycle.is_ending:
            await server.set_serving(True)
        if sglang:
            await sglang.open(service, loader, model.identity, stack)
        log_at_any_level(_log, "SERVING %s over %s", model.identity.model, ", ".join(exporter.transports))

        await lifecycle.ending()
        exporter.start_draining()
        await asyncio.gather(lifecycle.drain(), *([sglang.drain()] if sglang else []))
        if not await exporter.drained(lifecycle.left_s):
            _log.warning("%d leases were not released in time", exporter.stats().live_leases)
        lifecycle.raise_failure()
    _log.info("stopped")


def _make_decoders(config: EncoderConfig, preprocess_device: torch.device) -> DecoderPool:
    num_cpus = len(os.sched_getaffinity(0))
    return DecoderPool(
        max(2, num_cpus if preprocess_device.type == "cpu" else min(num_cpus, _GPU_DECODERS)),
        max_pixels=config.max_image_pixels,
        image_timeout_s=config.decode_timeout_s,
        video_timeout_s=config.video_decode_timeout_s,
        max_decoded_nbytes=config.max_decoded_media_bytes,
    )


def _make_sglang_port(config: EncoderConfig, metrics: EncoderMetrics, lifecycle: Lifecycle) -> SglangPort:
    """
    Raises:
        ValueError: settings of the port that cannot be read, or do not fit each other.
    """
    from vitrine_vlm.encoder_service.sglang.port import SglangPort  # imports pyzmq

    return SglangPort(config, metrics, lifecycle)
