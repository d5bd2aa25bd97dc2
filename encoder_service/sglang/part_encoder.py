"""Encodes the items of a part on this encoder: the same engine, cache and admission as for gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import copy_to_host
from vitrine_vlm.encoder_service.service import EncodeService
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.access_log import report_more, report_slowest
from vitrine_vlm.service_runtime.byte_budget import Reserve
from vitrine_vlm.service_runtime.cancellation import running_until
from vitrine_vlm.types import ItemTimings, Layout, MediaItem


@dataclass(frozen=True)
class EncodedPart:
    """layouts: of the items, in their order. rows_TW: their rows, one item behind the other, contiguous on the host."""

    layouts: list[Layout]
    rows_TW: torch.Tensor


class PartEncoder(Protocol):
    """Encodes parts, here or elsewhere."""

    async def encode(
        self, items: Sequence[MediaItem], request_id: str, deadline: float, reserve: Reserve
    ) -> EncodedPart:
        """Returns the rows of all items.

        Args:
            deadline: when the part ends, seconds of the monotonic clock.
            reserve: called with the size of each item's rows before they are computed; what it raises fails the part.

        Raises:
            VitrineError: of the first item that failed. The others are cancelled then.
        """
        ...


class PartRows:
    """Collects layouts and rows of the items of one part, in any order."""

    def __init__(self, num_items: int, row_nbytes: int, reserve: Reserve) -> None:
        self._layouts: list[Layout | None] = [None] * num_items
        self._rows: list[torch.Tensor | None] = [None] * num_items
        self._row_nbytes = row_nbytes
        self._reserve = reserve

    def set_layout(self, item_index: int, layout: Layout) -> None:
        """
        Raises:
            Overloaded: there is no room for its rows.
        """
        self._reserve(layout.num_tokens * self._row_nbytes)
        report_more(tokens=layout.num_tokens)
        self._layouts[item_index] = layout

    def set_rows(self, item_index: int, rows_TW: torch.Tensor) -> None:
        """Takes the rows of an item, [num_tokens, row_width], contiguous on the host."""
        self._rows[item_index] = rows_TW

    async def encoded(self) -> EncodedPart:
        """Returns all, once all are set."""
        layouts = [layout for layout in self._layouts if layout is not None]
        rows = [rows_TW for rows_TW in self._rows if rows_TW is not None]
        assert len(layouts) == len(rows) == len(self._rows)
        # In a thread: a copy of some pictures' rows takes long enough to stall every other request.
        return EncodedPart(layouts, rows[0] if len(rows) == 1 else await asyncio.to_thread(torch.cat, rows))


class LocalPartEncoder:
    """See `PartEncoder`. row_nbytes: bytes of one row."""

    def __init__(self, service: EncodeService, row_nbytes: int) -> None:
        self._service = service
        self._row_nbytes = row_nbytes

    async def encode(
        self, items: Sequence[MediaItem], request_id: str, deadline: float, reserve: Reserve
    ) -> EncodedPart:
        replies = _Replies(PartRows(len(items), self._row_nbytes, reserve))
        async with running_until(replies.has_failed, self._service.encode(items, replies, deadline=deadline)) as work:
            if replies.failure is not None:
                raise replies.failure
            work.result()
        return await replies.rows.encoded()


class _Replies:
    """See `service.Replies`. failure: the first error of an item."""

    def __init__(self, rows: PartRows) -> None:
        self.rows = rows
        self.failure: VitrineError | None = None
        self.has_failed = asyncio.Event()

    async def layout(self, item_index: int, layout: Layout) -> None:
        self.rows.set_layout(item_index, layout)

    @contextmanager
    def shipment(self, item_index: int) -> Iterator[_Shipment]:
        yield _Shipment(self.rows, item_index)

    async def failed(self, item_index: int, error: VitrineError) -> None:
        self.failure = self.failure or error
        self.has_failed.set()


class _Shipment:
    """See `service.Shipment`; its hook, too, which has nothing to queue: rows are copied once they are complete."""

    def __init__(self, rows: PartRows, item_index: int) -> None:
        self.hook = self
        self._rows = rows
        self._item_index = item_index

    def enqueue(self, rows_TW: torch.Tensor) -> None:
        pass

    def batch_ended(self) -> None:
        pass

    async def send(self, rows_TW: torch.Tensor, timings: ItemTimings) -> None:
        report_slowest(vars(timings))
        self._rows.set_rows(self._item_index, await asyncio.to_thread(copy_to_host, rows_TW))
