"""Builds the port for SGLang's language servers from the settings, and runs it until the encoder ends."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from yarl import URL

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.embedding_transport.fleet.discovery import parse_sources, watch_sources
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.encoder_service.service import EncodeService
from vitrine_vlm.encoder_service.sglang.fleet import FleetPartEncoder
from vitrine_vlm.encoder_service.sglang.http_port import Delivery, SglangHttp
from vitrine_vlm.encoder_service.sglang.part_encoder import LocalPartEncoder, PartEncoder
from vitrine_vlm.encoder_service.sglang.receivers import AllowedReceivers
from vitrine_vlm.encoder_service.sglang.registration import Registration, parse_server_sources
from vitrine_vlm.encoder_service.sglang.versions import receiver_class
from vitrine_vlm.encoder_service.sglang.zmq_push import ZmqPush
from vitrine_vlm.errors import EncoderUnavailable, VitrineError
from vitrine_vlm.service_runtime.byte_budget import ByteBudget
from vitrine_vlm.service_runtime.http_port import HttpPort
from vitrine_vlm.service_runtime.lifecycle import Lifecycle
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.tls import ClientTls
from vitrine_vlm.types import ModelIdentity

_log = logging.getLogger(__name__)
_STOP_GRACE_S = 0.5
# For parts of requests that a language server has begun before it removed this encoder from its list.
_LATE_PARTS_S = 0.5
_UNREGISTER_TIMEOUT_S = 2.0
_WAIT_FOR_PEERS_S = 5.0


class SglangPort:
    """The port. Create it on the service's event loop; `start`, then `open` once the model is loaded, then `drain`.

    Raises:
        ValueError: settings that cannot be read, or do not fit each other.
    """

    def __init__(self, config: EncoderConfig, metrics: EncoderMetrics, lifecycle: Lifecycle) -> None:
        self._config = config
        self._lifecycle = lifecycle
        self._tls = config.server_tls()
        if self._tls and self._tls.client_ca_file:
            raise ValueError("--sglang-port with --tls-client-ca-file: SGLang has no certificate of its own to show")
        self._sources = parse_sources(config.sglang_peers) if config.sglang_peers else []
        self._calls = RunningCalls()  # of its own: they end later than those of gRPC begin to be refused
        lifecycle.supervisor.on_failure(
            lambda failure: self._calls.end(lambda: _unavailable(f"has failed ({failure})"))
        )
        self._registration = Registration(_own_url(config), parse_server_sources(config.sglang_register))
        receiver, allowed = receiver_class(config.sglang_version), AllowedReceivers(config.sglang_receivers)
        if not config.sglang_receivers:
            _log.warning("--sglang-receivers is empty: rows may be sent nowhere, and every part will be refused")
        self._delivery = Delivery(receiver, allowed, ZmqPush(), config.sglang_timeout_s)
        budget = ByteBudget(config.sglang_max_held_bytes, "SGLang's requests and rows", "--sglang-max-held-bytes")
        metrics.watch_sglang(lambda: budget.reserved_nbytes)
        self._http = SglangHttp(self._delivery, self._calls, budget, metrics, lambda: lifecycle.reason)
        self._port = HttpPort(self._http.application(), config.port_limits(), budget, stop_grace_s=_STOP_GRACE_S)

    async def start(self, stack: AsyncExitStack) -> str:
        """Listens until the stack is closed; returns the address.

        Raises:
            OSError: the port cannot be listened on.
        """
        config = self._config
        stack.callback(self._delivery.allowed.close)
        stack.push_async_callback(self._delivery.push.close)
        stack.push_async_callback(self._port.close)
        ssl_context = self._tls.context() if self._tls else None
        await self._port.start(config.host, config.sglang_port, ssl_context, self._lifecycle.supervisor)
        return f"{config.host}:{config.sglang_port}"

    async def open(
        self, service: EncodeService, loader: MediaLoader, identity: ModelIdentity, stack: AsyncExitStack
    ) -> None:
        """Begins to serve, and registers this encoder. Its gRPC port serves already."""
        encoder: PartEncoder = LocalPartEncoder(service, identity.row_nbytes)
        if self._sources:
            client = self._connect_peers(identity, stack)
            with suppress(VitrineError):  # some come later
                await self._lifecycle.unless_ending(client.wait_ready(_WAIT_FOR_PEERS_S))
            encoder = FleetPartEncoder(client, identity)
        self._http.open(encoder, loader, identity.model)
        if not self._lifecycle.is_ending:
            self._registration.start(self._lifecycle.supervisor)

    async def drain(self) -> None:
        """Leaves the lists of language servers, then waits for parts in work, which fail at the deadline."""
        await self._registration.end(max(0.1, min(_UNREGISTER_TIMEOUT_S, self._lifecycle.left_s / 2)))
        await asyncio.sleep(min(_LATE_PARTS_S, self._lifecycle.left_s))
        self._calls.refuse(lambda: _unavailable("is shutting down"))
        if not await self._calls.idle(self._lifecycle.left_s):
            _log.warning("%d parts are cut off", self._calls.count)
            self._calls.end(lambda: _unavailable("is shutting down, and the part did not complete in time"))
        await self._port.answered(lambda: _unavailable("is shutting down"))

    def _connect_peers(self, identity: ModelIdentity, stack: AsyncExitStack) -> EncoderClient:
        config, supervisor = self._config, self._lifecycle.supervisor
        tls = None
        if config.sglang_peers_ca_file:
            own = config.tls_cert_file, config.tls_key_file
            tls = ClientTls(config.sglang_peers_ca_file, *own, config.sglang_peers_server_name)
        client = EncoderClient(
            [],
            identity,
            shm_folder=Path(config.shm_folder or "/dev/shm"),
            encode_timeout_s=config.sglang_timeout_s,
            tls=tls,
            supervisor=supervisor,
        )
        stack.push_async_callback(client.close)
        # A job, which may end by itself: fixed addresses do not change.
        supervisor.start_job("sglang peers", watch_sources(self._sources, client.set_addresses))
        return client


def _own_url(config: EncoderConfig) -> str:
    """Where language servers reach this port.

    Raises:
        ValueError: it is not known.
    """
    host = config.sglang_advertise_host or config.host
    if config.sglang_register and host in ("0.0.0.0", "::"):
        raise ValueError(
            f"--sglang-register with --host {host}: give --sglang-advertise-host, under which language servers reach "
            "this encoder"
        )
    return str(URL.build(scheme="https" if config.tls_cert_file else "http", host=host, port=config.sglang_port))


def _unavailable(reason: str) -> EncoderUnavailable:
    return EncoderUnavailable(f"the encoder {reason}: send the request to another one")
