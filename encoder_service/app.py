"""Builds an encoder from its configuration and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from prometheus_client import start_http_server

from embedding_transport.checkpoint import open_checkpoint
from embedding_transport.exporter import RowExporter, export_pools
from embedding_transport.loading import LoadingStopped, ProgressLog, choose_device, choose_dtype, gpu_uuids
from embedding_transport.types import DTYPES, ModelIdentity
from encoder_service.codec import describe_to_proto, stats_to_proto
from encoder_service.config import EncoderConfig
from encoder_service.engine.admission import Admission
from encoder_service.engine.batcher import Batcher
from encoder_service.engine.cache import EmbeddingCache
from encoder_service.engine.cost_model import CostModel, measured_cost
from encoder_service.families import Family, build_tower, family_of
from encoder_service.media.held_bytes import HeldBytes
from encoder_service.media.loader import MediaLoader
from encoder_service.metrics import EncoderMetrics, GpuStats
from encoder_service.models import PlainTower, VisionTower
from encoder_service.models.weights import stored_dtype
from encoder_service.preprocess.preprocessor import Preprocessor
from encoder_service.preprocess.settings import ProcessorSettings
from encoder_service.server import EncoderServer, EncoderServicer, Serving
from encoder_service.service import EncodeService
from service_runtime.logs import log_at_any_level
from service_runtime.memory import spare_startup_objects

if TYPE_CHECKING:
    from encoder_service.gpu.graphs import GpuTower

_log = logging.getLogger(__name__)
# Peers' Connect streams last until the server ends them: this only lets the last answers leave.
_STOP_GRACE_S = 0.5
# Where the GPU does the work, more threads only contend for the interpreter.
_GPU_PREPROCESS_THREADS = 8


@dataclass(frozen=True)
class LoadedModel:
    """The vision half of a checkpoint, ready to run."""

    identity: ModelIdentity
    settings: ProcessorSettings
    tower: VisionTower
    cost: CostModel
    gpu_stats: Callable[[], GpuStats] | None
    device: torch.device
    gpu_uuids: tuple[str, ...]


def load_model(
    config: EncoderConfig, must_stop: Callable[[], bool], show: Callable[[str, float], None] = lambda stage, part: None
) -> LoadedModel:
    """Finds the checkpoint and loads its tower, logging the progress. Blocking.

    Args:
        must_stop: once it says so, loading ends with LoadingStopped.
        show: called with a stage of the start ("weights", "graphs") and the part of it that is done.

    Raises:
        CheckpointError: no such checkpoint, or one that this encoder cannot serve.
        ValueError: the GPU, or the lack of one, does not allow what was asked for.
    """
    _log.info("opening checkpoint %s", config.model)
    checkpoint = open_checkpoint(config.model, config.revision, config.served_model_name, config.load_format)
    family = family_of(checkpoint)
    settings = ProcessorSettings.from_checkpoint(checkpoint, family.processor)
    device = choose_device(config.device)
    dtype_name = choose_dtype(config.dtype, device, stored_dtype(checkpoint, family.weights))
    has_fast_form = device.type == "cuda" and dtype_name == "bfloat16"
    if config.quantization == "fp8" and not has_fast_form:
        raise ValueError(f"--quantization fp8 needs bfloat16 on a GPU: this is {dtype_name} on {device.type}")
    progress = ProgressLog("loading visual weights", must_stop, partial(show, "weights"))
    plain = build_tower(checkpoint, device, DTYPES[dtype_name], progress)
    fast = _accelerated(plain, family, config, must_stop, partial(show, "graphs")) if has_fast_form else None
    identity = ModelIdentity(
        model=checkpoint.model,
        revision=checkpoint.revision,
        model_type=str(checkpoint.config["model_type"]),
        out_hidden_size=plain.out_hidden_size,
        deepstack_visual_indexes=plain.deepstack_visual_indexes,
        dtype=dtype_name,
    )
    _log.info("loaded %s, revision %s, %s on %s", identity.model, identity.revision[:12], dtype_name, device)
    tower = fast or plain
    cost = measured_cost(tower, plain.config.patch_width, device)
    return LoadedModel(identity, settings, tower, cost, fast.stats if fast else None, device, gpu_uuids(device))


def _accelerated(
    plain: PlainTower,
    family: Family,
    config: EncoderConfig,
    must_stop: Callable[[], bool],
    show: Callable[[float], None],
) -> GpuTower:
    from encoder_service.gpu.tower import gpu_tower  # needs Triton, which comes with torch's CUDA builds only

    max_graph_patches = config.max_batch_patches if config.cuda_graphs else 0
    progress = ProgressLog("capturing CUDA graphs", must_stop, show)
    return gpu_tower(plain, family.fuse, max_graph_patches, progress, fp8=config.quantization == "fp8")


async def serve(config: EncoderConfig) -> None:
    """Listens, loads, serves until SIGTERM or SIGINT, then drains.

    Raises:
        CheckpointError: see `load_model`.
        OSError: a port cannot be listened on.
        TransportUnavailable: no room for a pool.
        ValueError: the media folder does not exist.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    limits = config.media_limits()
    metrics = EncoderMetrics()
    servicer = EncoderServicer(metrics)
    server = EncoderServer(servicer)
    async with AsyncExitStack() as stack:
        # The port answers (NOT_SERVING) before anything slow begins, so that probes see progress, not refusal.
        addresses = f"grpc={await server.start(config.host, config.port, config.server_tls())}"
        stack.push_async_callback(server.stop, 0)
        if config.metrics_port:
            http_server, _ = start_http_server(config.metrics_port, config.host, metrics.registry)
            stack.callback(http_server.shutdown)
            addresses += f" metrics={config.host}:{config.metrics_port}"
        _log.info("LISTENING %s", addresses)

        try:
            model = await asyncio.to_thread(load_model, config, stop.is_set, metrics.show_progress)
        except LoadingStopped:
            _log.info("stopped while loading")
            return

        shm_folder = Path(config.shm_folder) if config.shm_folder else None
        pools = export_pools(model.device, config.cuda_ipc_pool_bytes, shm_folder, config.pool_bytes)
        exporter = RowExporter(pools, lease_ttl_s=config.lease_ttl_s)
        stack.push_async_callback(exporter.close)
        exporter.start()
        admission = Admission(model.cost, max_patches=config.max_queued_patches, max_s=config.max_queued_s)
        gpu_lost = asyncio.Event()
        watching = asyncio.create_task(_end_with_gpu(gpu_lost, server))
        stack.callback(watching.cancel)
        batcher = Batcher(
            model.tower,
            model.cost,
            max_batch_patches=config.max_batch_patches,
            device=model.device,
            on_batch=metrics.observe_batch,
            on_gpu_lost=gpu_lost.set,
        )
        stack.push_async_callback(batcher.close)
        batcher.start()
        loader, held = MediaLoader(limits), HeldBytes(config.max_held_media_bytes)
        stack.push_async_callback(loader.close)
        cache = EmbeddingCache(gpu_nbytes=config.cache_gpu_bytes, host_nbytes=config.cache_host_bytes)
        metrics.watch_cache(cache.stats)
        preprocess_device = model.device if config.gpu_preprocess else torch.device("cpu")
        num_cpus = os.cpu_count() or 1
        service = EncodeService(
            loader,
            held,
            Preprocessor(model.settings, limits, preprocess_device, DTYPES[model.identity.dtype]),
            admission,
            batcher,
            cache,
            revision=model.identity.revision,
            max_items=config.max_items,
            num_threads=num_cpus if preprocess_device.type == "cpu" else min(num_cpus, _GPU_PREPROCESS_THREADS),
            metrics=metrics,
        )
        stack.callback(service.close)
        metrics.watch_queue(admission, lambda: held.nbytes, lambda: batcher.waiting_patches)
        metrics.watch_exporter(exporter.stats)
        if model.gpu_stats is not None:
            metrics.watch_gpu(model.gpu_stats)
        description = describe_to_proto(
            model.identity, model.settings, exporter.transports, config.max_items, model.gpu_uuids
        )
        stats = lambda: stats_to_proto(admission.seconds, cache.stats(), exporter.stats())  # noqa: E731
        spare_startup_objects()
        servicer.open(Serving(description, service, exporter, stats))
        await server.set_serving(True)
        # With --dp the process in front waits for this line.
        log_at_any_level(_log, "SERVING %s over %s", model.identity.model, ", ".join(exporter.transports))

        await stop.wait()
        await _drain(server, servicer, exporter, config.drain_timeout_s)
    _log.info("stopped")


async def _end_with_gpu(lost: asyncio.Event, server: EncoderServer) -> None:
    await lost.wait()
    # No orderly way leads out: whatever is freed on the way is freed on the GPU.
    await server.end_process("the encoder ends: its GPU does nothing more for this process")


async def _drain(server: EncoderServer, servicer: EncoderServicer, exporter: RowExporter, timeout_s: float) -> None:
    """Takes nothing new, finishes what runs, waits for peers to release what they hold; all within `timeout_s`."""
    _log.info("draining for at most %g s", timeout_s)
    deadline = time.monotonic() + timeout_s
    await server.set_not_serving_for_good()
    servicer.start_draining()
    exporter.start_draining()
    try:
        async with asyncio.timeout(timeout_s):
            await servicer.idle()
    except TimeoutError:
        _log.warning("requests still ran after %g s and are cut off", timeout_s)
    if not await exporter.drained(max(0.0, deadline - time.monotonic())):
        _log.warning("%d leases were not released in time", exporter.stats().live_leases)
    await server.stop(_STOP_GRACE_S)
