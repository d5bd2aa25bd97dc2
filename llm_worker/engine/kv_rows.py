"""Keys and values as rows, one a token: the form in which a prompt's KV is sent from one worker to another.

Rows do not depend on blocks, so the two caches may have different block sizes. Those of a cache in FP8 are its bytes.

Shapes: L layers, S slots, K key/value heads, D head dim, T tokens, W = L * 2 * K * D elements of a row.
"""

from __future__ import annotations

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import copy_to_host, on_copy_stream
from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.llm_worker.models.kv_slots import as_bytes
from vitrine_vlm.types import EmbeddingRows

# Bounds the memory between cache and rows.
_TOKENS_AT_ONCE = 512


class CachedKv(RowSource):
    """The computed KV of tokens in the cache, whose blocks stay allocated while it is read. Safe on any thread.

    Args:
        layers_L2SKD: the cache.
        slots_T: cache slots of the tokens, in order, on the host.
    """

    def __init__(self, layers_L2SKD: torch.Tensor, slots_T: torch.Tensor) -> None:
        layers, two, _, heads, head_dim = layers_L2SKD.shape
        super().__init__((len(slots_T), layers * two * heads * head_dim), layers_L2SKD.dtype)
        self._layers_L2SKD = layers_L2SKD
        self._slots_T = slots_T

    def from_row(self, first_row: int) -> CachedKv:
        """The KV of the tokens from this one on."""
        return CachedKv(self._layers_L2SKD, self._slots_T[first_row:])

    def copy_to(self, target_TW: torch.Tensor) -> None:
        if target_TW.is_cuda:
            for rows, slots_T in _parts(self._slots_T):
                target_TW[rows].copy_(self._gathered(slots_T))
            return
        # Not on the engine's stream, where the copy would wait for the next step.
        with on_copy_stream(self._layers_L2SKD.device):
            for rows, slots_T in _parts(self._slots_T):
                target_TW[rows].copy_(copy_to_host(self._gathered(slots_T)))

    def on_host(self) -> torch.Tensor:
        host_TW = torch.empty(self.shape, dtype=self.dtype, pin_memory=self._layers_L2SKD.is_cuda)
        self.copy_to(host_TW)
        return host_TW

    def _gathered(self, slots_T: torch.Tensor) -> torch.Tensor:
        part_L2TKD = as_bytes(self._layers_L2SKD).index_select(2, slots_T.to(self._layers_L2SKD.device))
        return part_L2TKD.permute(2, 0, 1, 3, 4).flatten(1).view(self.dtype)


def land_kv(rows: EmbeddingRows, first_row: int, layers_L2SKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Copies rows from `first_row` on into the cache.

    Args:
        slots_T: cache slots for the rows, on the host.

    Raises:
        LeaseExpired: the rows' lease has ended. The content of the slots is undefined then.
    """
    layers, two, _, heads, head_dim = layers_L2SKD.shape
    for part, slots in _parts(slots_T):
        staged_TW = layers_L2SKD.new_empty(len(slots), layers * two * heads * head_dim)
        rows.copy_to(staged_TW, None, first_row + part.start)
        kv_L2TKD = staged_TW.view(-1, layers, two, heads, head_dim).permute(1, 2, 0, 3, 4)
        as_bytes(layers_L2SKD).index_copy_(2, slots.to(layers_L2SKD.device), as_bytes(kv_L2TKD))
    if layers_L2SKD.is_cuda:
        torch.cuda.current_stream(layers_L2SKD.device).synchronize()
    rows.check()


def _parts(slots_T: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    return [
        (slice(start, start + _TOKENS_AT_ONCE), slots_T[start : start + _TOKENS_AT_ONCE])
        for start in range(0, len(slots_T), _TOKENS_AT_ONCE)
    ]
