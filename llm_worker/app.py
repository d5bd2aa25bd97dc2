"""Builds an LLM worker from its configuration and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from embedding_transport.discovery import follow
from embedding_transport.encoder_client import EncoderClient
from embedding_transport.errors import VitrineError
from embedding_transport.loading import LoadingStopped
from llm_worker.config import LlmConfig
from llm_worker.dashboard.routes import Dashboard
from llm_worker.engine.engine import Engine
from llm_worker.engine.forward_pass import ForwardPass
from llm_worker.frontend.generation import Generator
from llm_worker.frontend.grpc_server import LlmServer, LlmServicer
from llm_worker.frontend.openai_http import OpenAiHttp, ServedModel
from llm_worker.loading import choose_runner, engine_config, load_model
from llm_worker.metrics import LlmMetrics

if TYPE_CHECKING:
    from llm_worker.tensor_parallel.followers import Followers

_log = logging.getLogger(__name__)
_READY_POLL_S = 0.1


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
        CheckpointError: see `load_model` and `Followers.start`.
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

        followers = await _start_followers(config, server, stack) if config.tp > 1 else None
        group = await asyncio.to_thread(followers.join) if followers is not None else None
        try:
            model = await asyncio.to_thread(load_model, config, stop.is_set, metrics.show_progress, group)
        except LoadingStopped:
            _log.info("stopped while loading")
            return

        decoder = model.decoder
        limits = engine_config(config, decoder)
        make_runner = choose_runner(decoder, limits)
        make_forward_pass = followers.forward_pass if followers is not None else ForwardPass
        forward_pass = await asyncio.to_thread(make_forward_pass, decoder, limits, make_runner)
        engine = Engine(forward_pass, limits)
        engine.start()
        stack.push_async_callback(asyncio.to_thread, engine.close)
        encoders = EncoderClient(
            [],
            model.identity,
            transport=config.transport,
            shm_folder=Path(config.shm_folder),
            connect_timeout_s=config.connect_timeout_s,
            encode_timeout_s=config.encode_timeout_s,
            takes_gpu_rows=decoder.device.type == "cuda",
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


async def _start_followers(config: LlmConfig, server: LlmServer, stack: AsyncExitStack) -> Followers:
    """The other ranks of a tensor parallel worker, which ends with any of them.

    Raises:
        CheckpointError: see `Followers.start`.
    """
    from llm_worker.tensor_parallel.followers import Followers  # torch.distributed is for those who use it

    followers = Followers(config)
    stack.push_async_callback(followers.stop)
    await followers.start()
    watching = asyncio.create_task(_end_with(followers, server))
    stack.callback(watching.cancel)
    return followers


async def _end_with(followers: Followers, server: LlmServer) -> None:
    _log.error("the worker ends: %s", await followers.failure())
    await server.set_not_serving_for_good()
    # No orderly way leads out: other threads may be in a collective, waiting for a rank that is gone.
    os._exit(1)


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
