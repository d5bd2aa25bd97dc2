"""Has encoders measure the media of a request, and describes them to vLLM."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.errors import BadRequest, EncoderUnavailable, InternalError, MediaError, VitrineError
from vitrine_vlm.gateway.families import takes_interval
from vitrine_vlm.gateway.media_parts import MediaPart
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import Layout, MediaItem, Ticket

_HASH_NBYTES = 32
_CLOSE_TIMEOUT_S = 0.3
_RENEWALS_IN_TTL = 3  # so that two may fail
_LEAST_INTERVAL_S = 0.2  # whatever an encoder says


@dataclass(frozen=True)
class MeasuredPart:
    """A part of a request with its layout, its ticket, and the family of the model that the encoder serves.

    ttl_s: seconds from its layout, or last renewal, for which the ticket can be claimed.
    """

    part: MediaPart
    layout: Layout
    ticket: Ticket
    model_type: str
    tenant: str
    ttl_s: float

    @property
    def item_id(self) -> str:
        """Equal for equal media of one tenant, and for no others: vLLM's caches go by it."""
        return hashlib.sha256(self.tenant.encode() + self.layout.content_hash).hexdigest()

    def replaced(self) -> str:
        return self.part.replaced(self._metadata(), self.item_id)

    def transfer_params(self) -> dict[str, object]:
        """From where the connector in the server gets the rows."""
        return {
            "ticket": self.ticket.value.hex(),
            "encoder_id": self.ticket.encoder_id,
            "kind": self.layout.kind,
            "num_tokens": self.layout.num_tokens,
            "tenant": self.tenant,
        }

    def _metadata(self) -> dict[str, object]:
        fields: dict[str, object] = {f"{self.layout.kind}_grid_thw": list(self.layout.grid_thw)}
        if self.layout.kind == "video" and takes_interval(self.model_type):
            fields["second_per_grid_ts"] = [self.layout.second_per_grid_t]
        elif self.layout.kind == "video":
            fields["timestamps"] = list(self.layout.timestamps_s)
        return fields


class MediaLayouts:
    """Gets layouts from a fleet of encoders, and holds their tickets while requests run."""

    def __init__(self, encoders: EncoderClient, supervisor: Supervisor) -> None:
        self._encoders = encoders
        self._supervisor = supervisor
        self._releases: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Waits a moment for the tickets of requests that have ended to be released."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=_CLOSE_TIMEOUT_S)

    @asynccontextmanager
    async def hold(
        self, parts: Sequence[MediaPart], request_id: str, tenant: str
    ) -> AsyncGenerator[list[MeasuredPart]]:
        """Asks for all layouts at the same time; renews the tickets inside the context, and releases them at its end.

        Rows of parts that are new are computed while the server gets the request.

        Raises:
            VitrineError: an item cannot be encoded; its `param` names the part.
        """
        layouts: dict[MediaItem, Layout] = {}
        first_parts = {part.item: part for part in reversed(parts)}  # equal items are measured once

        async def measure(part: MediaPart) -> None:
            try:
                answers = self._encoders.layouts([part.item], request_id, tenant, compute_ahead=part.is_new)
                async with aclosing(answers) as events:
                    async for event in events:
                        layouts[part.item] = event.layout
            except (BadRequest, MediaError) as error:
                error.param = part.param
                raise

        tasks = [asyncio.create_task(measure(part)) for part in first_parts.values()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            measured = [self._measured(part, layouts[part.item], tenant) for part in parts]
            renewal = self._supervisor.start_task("ticket renewal", self._renew(measured, request_id))
            try:
                yield measured
            finally:
                await self._supervisor.stop(renewal)
        finally:
            # In the background: no client waits for it, and none that disconnects prevents it.
            release = self._supervisor.start_job("ticket release", self._release(tasks, layouts))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    async def _renew(self, parts: Sequence[MeasuredPart], request_id: str) -> None:
        """Keeps tickets alive: a server may have a request wait for long, or need rows again that it had already."""
        interval_s = max(_LEAST_INTERVAL_S, min(part.ttl_s for part in parts) / _RENEWALS_IN_TTL)
        part_of_ticket = {part.ticket: part for part in parts}

        async def renew(part: MeasuredPart) -> None:
            # An encoder that is busy may answer next time, and one that is gone never does.
            with suppress(VitrineError, TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._encoders.renew_ticket(part.ticket, part.layout.kind, request_id, part.tenant)

        while True:
            await asyncio.sleep(interval_s)
            async with asyncio.TaskGroup() as tasks:
                for part in part_of_ticket.values():
                    tasks.create_task(renew(part))

    async def _release(self, tasks: Sequence[asyncio.Task[None]], layouts: Mapping[MediaItem, Layout]) -> None:
        """Releases the tickets, once all calls have ended."""
        # The calls go on, within the encoder's own time limits: a ticket that an encoder sends to a call that has just
        # been cancelled would stay until it expires.
        try:
            await asyncio.wait(tasks)
        finally:  # at the end of the process
            for task in tasks:
                task.cancel()
        await self._encoders.release_tickets([each.ticket for each in layouts.values() if each.ticket is not None])

    def _measured(self, part: MediaPart, layout: Layout, tenant: str) -> MeasuredPart:
        if layout.ticket is None or len(layout.content_hash) != _HASH_NBYTES:
            raise InternalError(f"the encoder has sent a layout without a ticket or a content hash: {layout}")
        encoder = self._encoders.description_of(layout.ticket.encoder_id)
        if encoder is None:
            raise EncoderUnavailable(f"encoder {layout.ticket.encoder_id} was lost right after its layout: try again")
        return MeasuredPart(part, layout, layout.ticket, encoder.identity.model_type, tenant, encoder.ticket_ttl_s)
