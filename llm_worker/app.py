"""Builds an LLM worker from its configuration and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from aiohttp import web

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.discovery import watch_sources
from vitrine_vlm.embedding_transport.fleet.row_peer import ConnectOptions
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter, export_pools
from vitrine_vlm.errors import VitrineError, WorkerUnavailable
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.llm_worker.dashboard.routes import Dashboard
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from vitrine_vlm.llm_worker.frontend.openai_http import OpenAiHttp
from vitrine_vlm.llm_worker.generation.generation import Generator, MakeFeed
from vitrine_vlm.llm_worker.generation.known_layouts import KnownLayouts
from vitrine_vlm.llm_worker.generation.media_feed import MediaFeed
from vitrine_vlm.llm_worker.generation.prompt_feed import PromptContext
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.loading import LoadedModel, choose_runner, engine_config, load_model
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.prefill.prefill_feed import PrefillFeed
from vitrine_vlm.llm_worker.prefill.rpc import SERVICE as PREFILL_SERVICE
from vitrine_vlm.llm_worker.prefill.rpc import prefill_handlers
from vitrine_vlm.llm_worker.prefill.server import Prefilling, PrefillServicer
from vitrine_vlm.llm_worker.requests import Requests
from vitrine_vlm.model_loading.loading import LoadingStopped, ProgressLog
from vitrine_vlm.service_runtime.lifecycle import Lifecycle
from vitrine_vlm.service_runtime.memory import freeze_gc
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from vitrine_vlm.llm_worker.tensor_parallel.tp_workers import TpWorkers

_log = logging.getLogger(__name__)
_READY_POLL_S = 0.1
# Sessions of decode workers last until the server ends them: this only lets the last answers leave.
_STOP_GRACE_S = 0.5

Upstream: TypeAlias = EncoderClient | PrefillClient


class Readiness:
    """Whether requests can be served, and why not: what /ready answers."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.upstream: Upstream | None = None
        self._lifecycle = lifecycle

    def __call__(self) -> tuple[bool, dict[str, Any]]:
        if self._lifecycle.reason:
            return False, {"reason": self._lifecycle.reason}
        if self.upstream is None:
            return False, {"reason": "loading the model"}
        name = "encoders" if isinstance(self.upstream, EncoderClient) else "prefill_workers"
        return self.upstream.ready, {name: [asdict(status) for status in self.upstream.status()]}


async def serve(config: LlmConfig) -> None:
    """Listens, loads, serves until SIGTERM or SIGINT, then drains.

    Raises:
        CheckpointError: see `load_model` and `TpWorkers.start`.
        OSError: a port cannot be listened on.
    """
    metrics, calls = LlmMetrics(), RunningCalls()
    requests = Requests(metrics, calls)
    servicer = LlmServicer(requests)
    prefill = PrefillServicer(requests) if config.role == "prefill" else None
    server = LlmServer(servicer, *([PREFILL_SERVICE] if prefill else []))
    if prefill:
        server.grpc.add_generic_rpc_handlers((prefill_handlers(prefill),))
    unavailable = lambda message: WorkerUnavailable(f"the worker {message}")  # noqa: E731
    lifecycle = Lifecycle(server, calls, unavailable, config.drain_timeout_s)
    supervisor = lifecycle.supervisor
    readiness = Readiness(lifecycle)
    http = OpenAiHttp(metrics, readiness, requests)
    application = http.application()
    dashboard = Dashboard(readiness)
    if config.dashboard:
        dashboard.add_routes(application)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(supervisor.close)
        # The ports answer before anything slow begins, so that probes see progress, not refusal.
        # handler_cancellation: a client that goes away ends its request everywhere.
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=_STOP_GRACE_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        tls = config.server_tls()
        await web.TCPSite(runner, config.host, config.port, ssl_context=tls.context() if tls else None).start()
        grpc_address = await server.start(config.host, config.grpc_port, tls, config.health_socket)
        stack.push_async_callback(server.stop, 0)
        _log.info("LISTENING http=%s:%d grpc=%s", config.host, runner.addresses[0][1], grpc_address)

        tp_workers = await _start_tp_workers(config, supervisor, stack) if config.tp > 1 else None
        try:
            model, forward_pass, limits = await _prepare(config, lambda: lifecycle.is_ending, metrics, tp_workers)
        except LoadingStopped:
            lifecycle.raise_failure()
            _log.info("stopped while loading")
            return

        decoder = model.decoder
        # Nothing can be cleaned up without the GPU: whatever is freed on the way is freed on it.
        gpu_lost = partial(supervisor.fail, "GPU", None, can_unwind=False)
        loop = asyncio.get_running_loop()
        engine = Engine(forward_pass, limits, on_gpu_lost=lambda: loop.call_soon_threadsafe(gpu_lost))
        engine.start(supervisor)
        stack.push_async_callback(asyncio.to_thread, engine.close)
        kv_format = KvFormat.of(model.identity, decoder.config)
        upstream, make_feed = _upstream(config, model, kv_format, limits.max_model_len, metrics, supervisor)
        stack.push_async_callback(upstream.close)
        context = PromptContext(engine, model.prompt_config, model.tokenizer)
        generator = Generator(context, make_feed, config.max_items)
        metrics.watch_engine(engine.stats)
        freeze_gc()
        served = ServedModel(model.identity.model, generator, model.defaults)
        http.open(served)
        dashboard.open(served.name, generator, engine.stats, upstream)
        servicer.open(served)
        exporter: RowExporter | None = None
        if prefill:
            shm_folder = Path(config.shm_folder) if config.shm_folder else None
            pools = export_pools(decoder.device, config.cuda_ipc_pool_bytes, shm_folder, config.pool_bytes)
            exporter = RowExporter(pools, lease_ttl_s=config.lease_ttl_s)
            stack.push_async_callback(exporter.close)
            exporter.start(supervisor)
            metrics.watch_exporter(exporter.stats)
            prefill.open(Prefilling(served, kv_format, exporter))
        await _follow(config, upstream, supervisor)
        # An encoder that does not fit is no reason to end: another may come, and text needs none. /ready says why.
        with suppress(VitrineError):
            await upstream.start()
        readiness.upstream = upstream
        supervisor.start_task("health", _keep_health(server, upstream))
        _log.info("SERVING %s with %s", model.identity.model, config.prefill_workers or config.encoders)

        await lifecycle.ending()
        if exporter is not None:
            exporter.start_draining()
        await lifecycle.drain()
        if exporter is not None and not await exporter.drained(lifecycle.left_s):
            _log.warning("%d leases were not released in time", exporter.stats().live_leases)
        await asyncio.gather(runner.cleanup(), server.stop(_STOP_GRACE_S))
        lifecycle.raise_failure()
    _log.info("stopped")


async def _prepare(
    config: LlmConfig, must_stop: Callable[[], bool], metrics: LlmMetrics, tp_workers: TpWorkers | None
) -> tuple[LoadedModel, ForwardPass, EngineConfig]:
    """Everything slow: the weights, and on a GPU the graphs.

    Raises:
        CheckpointError: see `load_model`; LoadingStopped: `must_stop` said so.
    """
    group = await asyncio.to_thread(tp_workers.join) if tp_workers is not None else None
    model = await asyncio.to_thread(load_model, config, must_stop, metrics.show_progress, group)
    limits = engine_config(config, model.decoder)
    progress = ProgressLog("capturing CUDA graphs, sizes", must_stop, partial(metrics.show_progress, "graphs"))
    make_runner = choose_runner(model.decoder, limits, progress)
    make_forward_pass = tp_workers.forward_pass if tp_workers is not None else ForwardPass
    return model, await asyncio.to_thread(make_forward_pass, model.decoder, limits, make_runner), limits


def _upstream(
    config: LlmConfig,
    model: LoadedModel,
    kv_format: KvFormat,
    max_model_len: int,
    metrics: LlmMetrics,
    supervisor: Supervisor,
) -> tuple[Upstream, MakeFeed]:
    """Who works for this worker, and how its requests use them."""
    known = KnownLayouts()
    gpu, shm_folder = model.decoder.device if model.decoder.device.type == "cuda" else None, Path(config.shm_folder)
    if config.role == "decode":
        workers = PrefillClient(
            kv_format,
            ConnectOptions(config.transport, shm_folder, config.connect_timeout_s, gpu, config.encoder_tls()),
            merge_size=model.prompt_config.merge_size,
            timeout_s=config.encode_timeout_s,
            max_prompt_tokens=max_model_len,
            on_hand_over=metrics.kv_hand_over.observe,
            supervisor=supervisor,
        )
        metrics.watch_prefill_workers(workers.stats)
        return workers, partial(PrefillFeed, workers, known)
    encoders = EncoderClient(
        [],
        model.identity,
        transport=config.transport,
        shm_folder=shm_folder,
        connect_timeout_s=config.connect_timeout_s,
        encode_timeout_s=config.encode_timeout_s,
        gpu=gpu,
        tls=config.encoder_tls(),
        supervisor=supervisor,
    )
    metrics.watch_encoders(encoders.stats)
    return encoders, partial(MediaFeed, encoders, known)


async def _start_tp_workers(config: LlmConfig, supervisor: Supervisor, stack: AsyncExitStack) -> TpWorkers:
    """The other ranks of a tensor parallel worker, which ends with any of them.

    Raises:
        CheckpointError: see `TpWorkers.start`.
    """
    from vitrine_vlm.llm_worker.tensor_parallel.tp_workers import TpWorkers  # torch.distributed is for those who use it

    tp_workers = TpWorkers(config, supervisor)
    stack.push_async_callback(tp_workers.stop)
    await tp_workers.start()
    return tp_workers


async def _follow(config: LlmConfig, upstream: Upstream, supervisor: Supervisor) -> None:
    """Keeps the client's addresses up to date; returns once some are known, or were not found at once.

    Raises:
        ValueError: a way to find them that cannot work here.
    """
    found = asyncio.Event()

    def use(addresses: list[str]) -> None:
        upstream.set_addresses(addresses)
        found.set()

    # A job, as fixed addresses need no looking for.
    supervisor.start_job("discovery", watch_sources(config.sources(), use))
    with suppress(TimeoutError):
        async with asyncio.timeout(config.connect_timeout_s):
            await supervisor.unless_failed(found.wait())


async def _keep_health(server: LlmServer, upstream: Upstream) -> None:
    """Keeps grpc.health.v1 saying what /ready says."""
    shown: bool | None = None
    while True:
        if upstream.ready != shown:
            shown = upstream.ready
            await server.set_serving(shown)
        await asyncio.sleep(_READY_POLL_S)
