"""Builds an LLM worker from its configuration and runs it until a signal asks it to stop."""

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
from vitrine_vlm.embedding_transport.pools.shm_pool import remove_stale_pools
from vitrine_vlm.embedding_transport.shipping.exporter import RowExporter, export_pools
from vitrine_vlm.embedding_transport.wire.client_calls import ClientCalls
from vitrine_vlm.embedding_transport.wire.message_bounds import MessageBounds
from vitrine_vlm.errors import VitrineError, WorkerUnavailable
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.llm_worker.dashboard.routes import Dashboard
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.cost_probes import measure_step_costs
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.kv_rows import compile_copies
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts
from vitrine_vlm.llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from vitrine_vlm.llm_worker.frontend.openai_http import OpenAiHttp
from vitrine_vlm.llm_worker.generation.encoder_inputs import EncoderInputs
from vitrine_vlm.llm_worker.generation.generation import Generator, MakeInputs
from vitrine_vlm.llm_worker.generation.layout_cache import LayoutCache
from vitrine_vlm.llm_worker.generation.request_inputs import PromptContext
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.loading import (
    LoadedModel,
    choose_runner,
    engine_config,
    load_model,
    make_grammar_compiler,
)
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prefill.client import PrefillClient
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.prefill.prefill_inputs import PrefillInputs
from vitrine_vlm.llm_worker.prefill.rpc import SERVICE as PREFILL_SERVICE
from vitrine_vlm.llm_worker.prefill.rpc import prefill_handlers
from vitrine_vlm.llm_worker.prefill.server import PrefillServicer, ServedPrefill
from vitrine_vlm.llm_worker.request_tracker import RequestTracker
from vitrine_vlm.model_loading.loading import LoadingStopped, ProgressLog
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.http_port import HttpPort
from vitrine_vlm.service_runtime.lifecycle import Lifecycle
from vitrine_vlm.service_runtime.memory import freeze_gc, return_memory_after_peaks
from vitrine_vlm.service_runtime.metrics_port import start_metrics_port
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from vitrine_vlm.llm_worker.tensor_parallel.tp_workers import TpWorkers

_log = logging.getLogger(__name__)
_READY_POLL_S = 0.1
# Only for the last answers to be sent: sessions of decode workers have ended with the exporter.
_STOP_GRACE_S = 0.5
# For a GPU to be quiet when steps are measured: an encoder's start on the same one takes about a minute.
_PROBES_PATIENCE_S = 10.0

# The client of the fleet that this worker gets its inputs from.
WorkerFleetClient: TypeAlias = EncoderClient | PrefillClient


class Readiness:
    """The answer of /ready: whether requests can be served, and the state of the other fleet or the reason why not.

    fleet_client: set once the model is loaded.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.fleet_client: WorkerFleetClient | None = None
        self._lifecycle = lifecycle

    def __call__(self) -> tuple[bool, dict[str, Any]]:
        if self._lifecycle.reason:
            return False, {"reason": self._lifecycle.reason}
        if self.fleet_client is None:
            return False, {"reason": "loading the model"}
        name = "encoders" if isinstance(self.fleet_client, EncoderClient) else "prefill_workers"
        return self.fleet_client.ready, {name: [asdict(status) for status in self.fleet_client.status()]}


async def serve(config: LlmConfig) -> None:
    """Listens, loads, serves until SIGTERM or SIGINT, then drains.

    Raises:
        CheckpointError: see `load_model` and `TpWorkers.start`.
        OSError: a port cannot be listened on.
    """
    metrics, calls = LlmMetrics(), RunningCalls()
    access = config.make_access(metrics.registry, "vitrine_llm")
    requests = RequestTracker(metrics, calls)
    servicer = LlmServicer(requests)
    held = ByteBudget(config.max_held_bytes)
    prefill = PrefillServicer(requests, held) if config.role == "prefill" else None
    bounds = MessageBounds(held, config.port_limits())
    others = [PREFILL_SERVICE] if prefill else []
    peer_rules = config.peer_rules(config.tls_client_ca_file is not None)
    port_limits = config.port_limits()
    interceptors = [ClientCalls(port_limits.max_client_connections), bounds]
    server = LlmServer(servicer, *others, access=access, limits=port_limits, interceptors=interceptors)
    if prefill:
        server.grpc.add_generic_rpc_handlers((prefill_handlers(prefill, peer_rules),))
    unavailable = lambda message: WorkerUnavailable(f"the worker {message}")  # noqa: E731
    lifecycle = Lifecycle(server, calls, unavailable, config.drain_timeout_s)
    supervisor = lifecycle.supervisor
    readiness = Readiness(lifecycle)
    has_metrics_port = config.metrics_port != 0
    http = OpenAiHttp(
        metrics, readiness, requests, config.origins(), config.allow_cache_reset, access, not has_metrics_port
    )
    application = http.application()
    dashboard = Dashboard(readiness, config.max_body_bytes, can_ask=not has_metrics_port)
    internal = web.Application() if has_metrics_port else application
    if config.dashboard:
        dashboard.add_routes(internal)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(supervisor.close)
        return_memory_after_peaks(held, supervisor)
        access.start(supervisor)
        # The ports answer before anything slow begins, so that probes get an answer and no refused connection.
        # They close last, so that new requests get 503 or UNAVAILABLE until then.
        port = HttpPort(application, port_limits, held, stop_grace_s=_STOP_GRACE_S)
        stack.push_async_callback(port.close)
        tls = config.server_tls()
        http_port = await port.start(config.host, config.port, tls.context() if tls else None, supervisor)
        grpc_address = await server.start(config.host, config.grpc_port, tls, config.health_socket)
        stack.push_async_callback(server.stop, _STOP_GRACE_S)
        addresses = f"http={config.host}:{http_port} grpc={grpc_address}"
        if has_metrics_port:
            address = await start_metrics_port(config, config.host, internal, metrics.registry, supervisor, stack)
            addresses += f" metrics={address}"
        _log.info("LISTENING %s", addresses)
        remove_stale_pools(Path(config.shm_folder))

        tp_workers = await _start_tp_workers(config, supervisor, stack) if config.tp > 1 else None
        try:
            prepared = await _prepare(config, lambda: lifecycle.is_ending, metrics, tp_workers)
        except LoadingStopped:
            lifecycle.raise_failure()
            _log.info("stopped while loading")
            return

        model, forward_pass, limits, costs = prepared
        decoder = model.decoder
        # Nothing can be cleaned up without the GPU, as tensors on it could not be freed.
        gpu_lost = partial(supervisor.fail, "GPU", None, can_unwind=False)
        loop = asyncio.get_running_loop()
        engine = Engine(forward_pass, limits, lambda: loop.call_soon_threadsafe(gpu_lost), costs)
        engine.start(supervisor)
        stack.push_async_callback(asyncio.to_thread, engine.close)
        kv_format = KvFormat.of(model.identity, decoder.config, limits.kv_cache_dtype)
        fleet_client, make_inputs = _make_fleet_client(
            config, model, kv_format, limits.max_model_len, metrics, supervisor
        )
        stack.push_async_callback(fleet_client.close)
        grammars = await asyncio.to_thread(make_grammar_compiler, model)
        if grammars is not None:
            stack.callback(grammars.close)
        context = PromptContext(engine, model.prompt_config, model.tokenizer, grammars)
        generator = Generator(context, make_inputs, config.max_items)
        stack.callback(generator.close)
        metrics.watch_engine(engine.stats)
        freeze_gc()
        served = ServedModel(model.identity.model, generator, model.defaults, config.model)
        http.open(served)
        dashboard.open(served.name, generator, engine.stats, fleet_client)
        servicer.open(served)
        exporter: RowExporter | None = None
        if prefill:
            shm_folder = Path(config.shm_folder) if config.shm_folder else None
            pools = export_pools(decoder.device, config.cuda_ipc_pool_bytes, shm_folder, config.pool_bytes)
            exporter = RowExporter(pools, lease_ttl_s=config.lease_ttl_s, rules=peer_rules)
            stack.push_async_callback(exporter.close)
            exporter.start(supervisor)
            metrics.watch_exporter(exporter.stats)
            prefill.open(ServedPrefill(served, kv_format, exporter))
        await _discover(config, fleet_client, lifecycle)
        # The worker runs on without a fitting encoder: one may come, and text needs none. /ready has the reason.
        with suppress(VitrineError):
            await lifecycle.unless_ending(fleet_client.start())
        readiness.fleet_client = fleet_client
        supervisor.start_task("health", _keep_health(server, fleet_client))
        if not lifecycle.is_ending:
            _log.info("SERVING %s with %s", model.identity.model, config.prefill_workers or config.encoders)

        await lifecycle.ending()
        if exporter is not None:
            exporter.start_draining()
        await lifecycle.drain()
        if exporter is not None and not await exporter.drained(lifecycle.left_s):
            _log.warning("%d leases were not released in time", exporter.stats().live_leases)
        await port.answered(lifecycle.refusal)
        lifecycle.raise_failure()
    _log.info("stopped")


async def _prepare(
    config: LlmConfig, must_stop: Callable[[], bool], metrics: LlmMetrics, tp_workers: TpWorkers | None
) -> tuple[LoadedModel, ForwardPass, EngineConfig, StepCosts]:
    """Does everything that is slow: loads the weights, captures the graphs on a GPU, and measures steps.

    Raises:
        CheckpointError: see `load_model`; LoadingStopped: `must_stop` has returned True.
    """
    group = await asyncio.to_thread(tp_workers.join) if tp_workers is not None else None
    model = await asyncio.to_thread(load_model, config, must_stop, metrics.show_progress, group)
    limits = engine_config(config, model.decoder)
    progress = ProgressLog("capturing CUDA graphs, sizes", must_stop, partial(metrics.show_progress, "graphs"))
    make_runner = choose_runner(model.decoder, limits, progress)
    make_forward_pass = tp_workers.forward_pass if tp_workers is not None else ForwardPass
    forward_pass = await asyncio.to_thread(make_forward_pass, model.decoder, limits, make_runner)
    if config.role != "both":
        await asyncio.to_thread(compile_copies, forward_pass.kv_cache.layers)
    # A CPU is never quiet: the corrections by later steps have to do there.
    patience_s = _PROBES_PATIENCE_S if model.decoder.device.type == "cuda" else 0.0
    costs = await asyncio.to_thread(measure_step_costs, forward_pass, limits, patience_s)
    return model, forward_pass, limits, costs


def _make_fleet_client(
    config: LlmConfig,
    model: LoadedModel,
    kv_format: KvFormat,
    max_model_len: int,
    metrics: LlmMetrics,
    supervisor: Supervisor,
) -> tuple[WorkerFleetClient, MakeInputs]:
    """The client of the encoders or prefill workers, and what makes a request's inputs with it."""
    layout_cache = LayoutCache()
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
        return workers, partial(PrefillInputs, workers, layout_cache)
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
    return encoders, partial(EncoderInputs, encoders, layout_cache)


async def _start_tp_workers(config: LlmConfig, supervisor: Supervisor, stack: AsyncExitStack) -> TpWorkers:
    """Starts the other ranks of a tensor parallel worker, which ends when any of them ends.

    Raises:
        CheckpointError: see `TpWorkers.start`.
    """
    from vitrine_vlm.llm_worker.tensor_parallel.tp_workers import TpWorkers  # imports torch.distributed

    tp_workers = TpWorkers(config, supervisor)
    stack.push_async_callback(tp_workers.stop)
    await tp_workers.start()
    return tp_workers


async def _discover(config: LlmConfig, fleet_client: WorkerFleetClient, lifecycle: Lifecycle) -> None:
    """Keeps the client's addresses up to date; returns once some are known, or after `connect_timeout_s`.

    Raises:
        ValueError: a source of addresses that cannot work here.
    """
    found = asyncio.Event()

    def use(addresses: list[str]) -> None:
        fleet_client.set_addresses(addresses)
        found.set()

    # A job, which may end by itself: fixed addresses do not change.
    lifecycle.supervisor.start_job("discovery", watch_sources(config.sources(), use))
    with suppress(TimeoutError):
        async with asyncio.timeout(config.connect_timeout_s):
            await lifecycle.supervisor.unless_failed(lifecycle.unless_ending(found.wait()))


async def _keep_health(server: LlmServer, fleet_client: WorkerFleetClient) -> None:
    """Keeps the status in grpc.health.v1 equal to that of /ready."""
    shown: bool | None = None
    while True:
        if fleet_client.ready != shown:
            shown = fleet_client.ready
            await server.set_serving(shown)
        await asyncio.sleep(_READY_POLL_S)
