"""Encodes the items of a part on the encoders that their content is routed to.

SGLang spreads items by count over its encoders, in random order, so that equal pictures meet on none of them. Here each
item goes by gRPC to the encoder whose cache should have it, this one included, and its rows come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.encoder_service.sglang.part_encoder import EncodedPart, PartRows
from vitrine_vlm.service_runtime.access_log import report_slowest
from vitrine_vlm.service_runtime.byte_budget import Reserve
from vitrine_vlm.types import EmbeddingRows, LayoutEvent, MediaItem, ModelIdentity


class FleetPartEncoder:
    """See `PartEncoder`.

    Args:
        client: of all encoders of the fleet, this one included.
        identity: of the model that they serve.
    """

    def __init__(self, client: EncoderClient, identity: ModelIdentity) -> None:
        self._client = client
        self._identity = identity

    async def encode(
        self, items: Sequence[MediaItem], request_id: str, deadline: float, reserve: Reserve
    ) -> EncodedPart:
        part = PartRows(len(items), self._identity.row_nbytes, reserve)
        async with aclosing(self._client.encode(items, request_id)) as events:
            async for event in events:
                if isinstance(event, LayoutEvent):
                    part.set_layout(event.item_index, event.layout)
                    continue
                report_slowest(vars(event.rows.timings))
                try:
                    part.set_rows(event.item_index, await asyncio.to_thread(self._copy, event.rows))
                finally:
                    event.rows.release()
        return await part.encoded()

    def _copy(self, rows: EmbeddingRows) -> torch.Tensor:
        """Returns the rows in memory of this process, [num_tokens, row_width].

        Raises:
            LeaseExpired: they were released by their encoder before the copy had ended.
        """
        hidden, num_deepstack = self._identity.out_hidden_size, len(self._identity.deepstack_visual_indexes)
        rows_TW = torch.empty(rows.num_tokens, self._identity.row_width, dtype=DTYPES[self._identity.dtype])
        deepstack_TND = rows_TW[:, hidden:].unflatten(1, (num_deepstack, hidden)) if num_deepstack else None
        deepstack_NTD = deepstack_TND.transpose(0, 1) if deepstack_TND is not None else None
        rows.copy_to(rows_TW[:, :hidden], deepstack_NTD, 0)
        rows.check()
        return rows_TW
