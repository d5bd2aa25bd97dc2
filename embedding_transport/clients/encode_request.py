"""One request for rows or layouts: its items, how they are shared among encoders, and what was passed on already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderPeer
from vitrine_vlm.embedding_transport.receiving.event_stream import EventStream
from vitrine_vlm.errors import InternalError, VitrineError
from vitrine_vlm.service_runtime.retry import Attempts, RetryPolicy
from vitrine_vlm.types import EncodeEvent, Layout, MediaItem, RowsEvent


class Share:
    """The items of a request that go to one encoder. `pending` are those that lack what was asked for: in flight."""

    def __init__(self, peer: EncoderPeer) -> None:
        self.peer = peer
        self.pending: set[int] = set()

    def add(self, index: int) -> None:
        self.pending.add(index)
        self.peer.in_flight += 1

    def remove(self, index: int) -> None:
        self.pending.remove(index)
        self.peer.in_flight -= 1

    def release(self) -> None:
        """The call has ended: the pending items are no longer in flight on this encoder."""
        self.peer.in_flight -= len(self.pending)
        self.pending.clear()


class Request:
    """One call of `encode` or `layouts`.

    keys: the content keys of the items, by which they are routed. moved: items that have left an encoder; none leaves
    another one.
    """

    def __init__(
        self,
        items: Sequence[MediaItem],
        request_id: str,
        tenant: str,
        policy: RetryPolicy[VitrineError],
        discard: Callable[[EncodeEvent], None],
        *,
        layout_only: bool = False,
        compute_ahead: bool = False,
    ) -> None:
        self.items = items
        self.keys = [b""] * len(items)
        self.moved: set[int] = set()
        self.request_id = request_id
        self.tenant = tenant
        self.layout_only = layout_only
        self.compute_ahead = compute_ahead
        self.attempts = Attempts(policy)
        # Of layouts: calls in flight, and why one has failed. The others go on, for the tickets that they bring.
        self.num_calls = 0
        self.failure: VitrineError | None = None
        self.events: EventStream[EncodeEvent] = EventStream(discard)
        self._layouts: dict[int, Layout] = {}

    async def emit(self, share: Share, event: EncodeEvent) -> None:
        """Passes an event of a share on to the caller.

        Raises:
            InternalError: another encoder, which was lost, had sent a different layout of the item.
        """
        index = event.item_index
        if isinstance(event, RowsEvent):
            share.remove(index)
        else:
            earlier = self._layouts.setdefault(index, event.layout)
            if earlier != event.layout:
                raise InternalError(f"item {index} has layout {event.layout} now and had {earlier} before")
            if earlier is not event.layout:  # the layout was emitted before
                return
            if self.layout_only:
                share.remove(index)
        await self.events.emit(event)
