"""Keys and values as rows, one a token: the form in which a prompt's KV is sent from one worker to another.

Rows do not depend on blocks, so the two caches may have different block sizes. Those of a cache in FP8 are its bytes.

Shapes: L layers, S slots, K key/value heads, D head dim, T tokens, W = L * 2 * K * D elements of a row.
"""

from __future__ import annotations

import torch

from vitrine_vlm.embedding_transport.pools.row_copies import copy_to_host, on_copy_stream
from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.embedding_transport.receiving.received_rows import copy_rows
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
        super().__init__((len(slots_T), _row_width(layers_L2SKD)), layers_L2SKD.dtype)
        self._layers_L2SKD = layers_L2SKD
        self._slots_T = slots_T

    def from_row(self, first_row: int) -> CachedKv:
        """The KV of the tokens from this one on."""
        return CachedKv(self._layers_L2SKD, self._slots_T[first_row:])

    def copy_to(self, target_TW: torch.Tensor) -> None:
        if target_TW.is_cuda:
            # In one launch, however long the prompt is: beside a step that fills the GPU each would wait for its turn.
            _gather(self._layers_L2SKD, self._slots_T, target_TW)
            return
        # Not on the engine's stream, where the copy would wait for the next step.
        with on_copy_stream(self._layers_L2SKD.device):
            for rows, slots_T in _parts(self._slots_T):
                part_TW = self._layers_L2SKD.new_empty(len(slots_T), self.shape[1])
                _gather(self._layers_L2SKD, slots_T, part_TW)
                target_TW[rows].copy_(copy_to_host(part_TW))

    def on_host(self) -> torch.Tensor:
        host_TW = torch.empty(self.shape, dtype=self.dtype, pin_memory=self._layers_L2SKD.is_cuda)
        self.copy_to(host_TW)
        return host_TW


def land_kv(rows: EmbeddingRows, first_row: int, layers_L2SKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Copies rows from `first_row` on into the cache; on a GPU the copies are only launched.

    The content of the slots is valid if the rows' check passes after the copies.

    Args:
        slots_T: cache slots for the rows, on the host.
    """
    for part, part_slots_T in _parts(slots_T):
        staged_TW = layers_L2SKD.new_empty(len(part_slots_T), _row_width(layers_L2SKD))
        rows.copy_to(staged_TW, None, first_row + part.start)
        _scatter(staged_TW, part_slots_T, layers_L2SKD)


def compile_copies(layers_L2SKD: torch.Tensor) -> None:
    """Has the kernels compiled that the first prompt would otherwise wait for; no step may run meanwhile."""
    if not layers_L2SKD.is_cuda:
        return
    slots_T = torch.zeros(1, dtype=torch.int64)
    sent_TW, landed_TW = layers_L2SKD.new_empty(2, 1, _row_width(layers_L2SKD)).unbind()
    _gather(layers_L2SKD, slots_T, sent_TW)
    copy_rows(sent_TW, landed_TW, None, 0)
    _scatter(landed_TW, slots_T, layers_L2SKD)
    torch.cuda.synchronize(layers_L2SKD.device)


def _gather(layers_L2SKD: torch.Tensor, slots_T: torch.Tensor, rows_TW: torch.Tensor) -> None:
    """Copies slots into rows on the same device; on a GPU on the current stream, which is not waited for."""
    if layers_L2SKD.is_cuda:
        from vitrine_vlm.gpu_kernels.kv_row_copies import (
            gather_rows,  # needs Triton, which comes with torch's CUDA builds only
        )

        gather_rows(layers_L2SKD, _on_device(slots_T, layers_L2SKD.device), rows_TW)
        return
    part_L2TKD = as_bytes(layers_L2SKD).index_select(2, slots_T)
    as_bytes(rows_TW).copy_(part_L2TKD.permute(2, 0, 1, 3, 4).flatten(1))


def _scatter(rows_TW: torch.Tensor, slots_T: torch.Tensor, layers_L2SKD: torch.Tensor) -> None:
    """Copies rows into slots, as `_gather` does the other way."""
    if layers_L2SKD.is_cuda:
        from vitrine_vlm.gpu_kernels.kv_row_copies import scatter_rows

        scatter_rows(rows_TW, _on_device(slots_T, layers_L2SKD.device), layers_L2SKD)
        return
    layers, two, _, heads, head_dim = layers_L2SKD.shape
    kv_L2TKD = rows_TW.view(-1, layers, two, heads, head_dim).permute(1, 2, 0, 3, 4)
    as_bytes(layers_L2SKD).index_copy_(2, slots_T, as_bytes(kv_L2TKD))


def _on_device(slots_T: torch.Tensor, device: torch.device) -> torch.Tensor:
    return slots_T.pin_memory().to(device, non_blocking=True)


def _row_width(layers_L2SKD: torch.Tensor) -> int:
    layers, two, _, heads, head_dim = layers_L2SKD.shape
    return layers * two * heads * head_dim


def _parts(slots_T: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    return [
        (slice(start, start + _TOKENS_AT_ONCE), slots_T[start : start + _TOKENS_AT_ONCE])
        for start in range(0, len(slots_T), _TOKENS_AT_ONCE)
    ]
