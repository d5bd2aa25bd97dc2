"""Builds an LLM worker from its configuration and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

from embedding_transport.checkpoint import open_checkpoint
from embedding_transport.discovery import follow
from embedding_transport.encoder_client import EncoderClient
from embedding_transport.errors import VitrineError
from embedding_transport.loading import LoadingStopped, ProgressLog, choose_device, choose_dtype
from embedding_transport.types import DTYPES, ModelIdentity
from llm_worker.config import LlmConfig
from llm_worker.dashboard.routes import Dashboard
from llm_worker.engine.engine import Engine, EngineConfig
from llm_worker.engine.runner import MakeRunner, plain_runner
from llm_worker.frontend.generation import Generator
from llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from llm_worker.frontend.openai_http import OpenAiHttp, ServedModel
from llm_worker.frontend.sampling_defaults import SamplingDefaults
from llm_worker.metrics import LlmMetrics
from llm_worker.models import build_decoder
from llm_worker.models.decoder import TextDecoder
from llm_worker.models.weights import stored_dtype
from llm_worker.prompt.config import PromptConfig
from llm_worker.prompt.tokenizer import PromptTokenizer

_log = logging.getLogger(__name__)
_READY_POLL_S = 0.1


@dataclass(frozen=True)
class LoadedModel:
    """The language half of a checkpoint, ready to run."""

    identity: ModelIdentity
    decoder: TextDecoder
    tokenizer: PromptTokenizer | None
    prompt_config: PromptConfig
    defaults: SamplingDefaults


def load_model(
    config: LlmConfig, must_stop: Callable[[], bool], show: Callable[[str, float], None] = lambda stage, part: None
) -> LoadedModel:
    """Finds the checkpoint and loads its decoder, logging the progress. Blocking.

    Args:
        must_stop: once it says so, loading ends with LoadingStopped.
        show: called with a stage of the start ("weights") and the part of it that is done.

    Raises:
        CheckpointError: no such checkpoint, or one that this worker cannot serve.
    """
    _log.info("opening checkpoint %s", config.model)
    checkpoint = open_checkpoint(config.model, config.revision, config.served_model_name, config.load_format)
    tokenizer = None if config.skip_tokenizer_init else PromptTokenizer(checkpoint)
    device = choose_device(config.device)
    dtype_name = choose_dtype(config.dtype, device, stored_dtype(checkpoint))
    progress = ProgressLog("loading language weights", must_stop, partial(show, "weights"))
    decoder = build_decoder(checkpoint, device, DTYPES[dtype_name], progress)
    vision = checkpoint.config["vision_config"]
    identity = ModelIdentity(
        model=checkpoint.model,
        revision=checkpoint.revision,
        model_type=decoder.config.model_type,
        out_hidden_size=decoder.config.hidden_size,
        deepstack_visual_indexes=tuple(vision.get("deepstack_visual_indexes") or ()),
        dtype=dtype_name,
    )
    _log.info("loaded %s, revision %s, %s on %s", identity.model, identity.revision[:12], dtype_name, device)
    return LoadedModel(
        identity,
        decoder,
        tokenizer,
        PromptConfig.from_checkpoint(checkpoint),
        SamplingDefaults.from_checkpoint(checkpoint),
    )


class Readiness:
    """Whether requests can be served, and why not: what /ready answers."""

    def __init__(self) -> None:
        self.encoders: EncoderClient | None = None

    def __call__(self) -> tuple[bool, dict[str, Any]]:
        if self.encoders is None:
            return False, {"reason": "loading the model"}
        encoders = [asdict(status) for status in self.encoders.status()]
        return self.encoders.ready, {"encoders": encoders}


async def serve(config: LlmConfig) -> None:
    """Listens, loads, serves until SIGTERM or SIGINT, then drains.

    Raises:
        CheckpointError: see `load_model`.
        OSError: a port cannot be listened on.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = LlmMetrics()
    readiness = Readiness()
    http = OpenAiHttp(metrics, readiness)
    application = http.application()
    dashboard = Dashboard(readiness)
    if config.dashboard:
        dashboard.add_routes(application)
    servicer = LlmServicer(metrics)
    server = LlmServer(servicer)
    async with AsyncExitStack() as stack:
        # The ports answer before anything slow begins, so that probes see progress, not refusal.
        # handler_cancellation: a client that goes away ends its request everywhere.
        runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=config.drain_timeout_s
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        tls = config.server_tls()
        await web.TCPSite(runner, config.host, config.port, ssl_context=tls.context() if tls else None).start()
        grpc_address = await server.start(config.host, config.grpc_port, tls)
        stack.push_async_callback(server.stop, 0)
        _log.info("LISTENING http=%s:%d grpc=%s", config.host, runner.addresses[0][1], grpc_address)

        try:
            model = await asyncio.to_thread(load_model, config, stop.is_set, metrics.show_progress)
        except LoadingStopped:
            _log.info("stopped while loading")
            return

        engine_config = config.engine_config(model.decoder.config.max_position_embeddings)
        engine = await asyncio.to_thread(Engine, model.decoder, engine_config, _runner_maker(model, engine_config))
        engine.start()
        stack.push_async_callback(asyncio.to_thread, engine.close)
        encoders = EncoderClient(
            [],
            model.identity,
            transport=config.transport,
            shm_folder=Path(config.shm_folder),
            connect_timeout_s=config.connect_timeout_s,
            encode_timeout_s=config.encode_timeout_s,
            takes_gpu_rows=model.decoder.device.type == "cuda",
            tls=config.encoder_tls(),
        )
        stack.push_async_callback(encoders.close)
        generator = Generator(engine, encoders, model.tokenizer, model.prompt_config, config.max_items)
        metrics.watch_engine(engine.stats)
        metrics.watch_encoders(encoders.stats)
        served = ServedModel(model.identity.model, generator, model.defaults)
        http.open(served)
        dashboard.open(served.name, generator, engine.stats, encoders)
        servicer.open(served)
        following = await _follow_encoders(config, encoders)
        stack.callback(following.cancel)
        # An encoder that does not fit is no reason to end: another may come, and text needs none. /ready says why.
        with suppress(VitrineError):
            await encoders.start()
        readiness.encoders = encoders
        watching = asyncio.create_task(_keep_health(server, encoders))
        stack.callback(watching.cancel)
        _log.info("SERVING %s with encoders %s", model.identity.model, config.encoders)

        await stop.wait()
        watching.cancel()
        _log.info("draining for at most %g s", config.drain_timeout_s)
        await server.set_not_serving_for_good()
        await asyncio.gather(runner.cleanup(), server.stop(config.drain_timeout_s))
    _log.info("stopped")


def _runner_maker(model: LoadedModel, config: EngineConfig) -> MakeRunner:
    """Fused kernels and CUDA graphs in bfloat16 on a GPU; the plain decoder elsewhere, and for experts."""
    decoder = model.decoder
    if decoder.device.type != "cuda" or decoder.dtype != torch.bfloat16 or decoder.config.moe is not None:
        return plain_runner
    from llm_worker.gpu.gpu_runner import GpuRunner  # needs Triton, which comes with torch's CUDA builds only
    from llm_worker.gpu.prefill_attention import causal_attention

    return lambda decoder, kv_cache, buffer: GpuRunner(
        decoder, kv_cache, buffer, config.max_num_seqs, config.max_model_len, causal_attention()
    )


async def _follow_encoders(config: LlmConfig, encoders: EncoderClient) -> asyncio.Task[None]:
    """Keeps the client's encoders up to date; returns once some are known, or were not found at once.

    Raises:
        ValueError: a way to find encoders that cannot work here.
    """
    found = asyncio.Event()

    def use(addresses: list[str]) -> None:
        encoders.set_addresses(addresses)
        found.set()

    following = asyncio.create_task(follow(config.encoder_sources(), use))
    finding = asyncio.create_task(found.wait())
    await asyncio.wait([following, finding], timeout=config.connect_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finding.cancel()
    if not found.is_set() and following.done():
        following.result()
    following.add_done_callback(_log_end_of_following)
    return following


def _log_end_of_following(following: asyncio.Task[None]) -> None:
    if not following.cancelled() and (error := following.exception()):
        _log.error("encoders are not looked for any more, those that are known stay: %s", error, exc_info=error)


async def _keep_health(server: LlmServer, encoders: EncoderClient) -> None:
    """Keeps grpc.health.v1 saying what /ready says."""
    shown: bool | None = None
    while True:
        if encoders.ready != shown:
            shown = encoders.ready
            await server.set_serving(shown)
        await asyncio.sleep(_READY_POLL_S)
