"""Rank 0's table of the encoders' pools that all ranks have mapped."""

from __future__ import annotations

import json
import logging
import struct
import weakref
from collections.abc import Sequence
from contextlib import suppress

from vitrine_vlm.embedding_transport.pools.pool import PoolMapping
from vitrine_vlm.llm_worker.tensor_parallel.channel import Channel, ChannelClosed, FrameKind

_log = logging.getLogger(__name__)

NUMBER = struct.Struct("<Q")


class SharedPools:
    """Has a pool mapped by the other ranks when its first embeddings come, and unmapped when rank 0 has unmapped it."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self._numbers: weakref.WeakKeyDictionary[PoolMapping, int | None] = weakref.WeakKeyDictionary()
        self._next = 0

    def number_of(self, pool: PoolMapping) -> int | None:
        """The number by which messages name the pool; None where not all ranks can map it.

        Raises:
            ChannelClosed: a rank has ended.
        """
        if pool not in self._numbers:
            self._numbers[pool] = self._share(pool)
        return self._numbers[pool]

    def _share(self, pool: PoolMapping) -> int | None:
        number, self._next = self._next, self._next + 1
        # A mapping that is left would pin the encoder's memory even after the encoder's end.
        weakref.finalize(pool, _unmap, self._channels, number).atexit = False
        for channel in self._channels:
            channel.send(FrameKind.MAP, NUMBER.pack(number) + json.dumps(pool.source()).encode())
        errors = [error for channel in self._channels if (error := channel.expect(FrameKind.MAPPED).decode())]
        if errors:
            _log.warning("rank 0 broadcasts an encoder's embeddings, as another rank cannot read them: %s", errors[0])
        return None if errors else number


def _unmap(channels: Sequence[Channel], number: int) -> None:
    for channel in channels:
        with suppress(ChannelClosed):
            channel.send(FrameKind.UNMAP, NUMBER.pack(number))
