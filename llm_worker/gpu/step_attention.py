"""Attention of a long step: captured work for the sequences that decode, one kernel for the prefill chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch

from vitrine_vlm.gpu_kernels.graph_capture import Work
from vitrine_vlm.gpu_kernels.packed_attention import Bounds, PackedAttention
from vitrine_vlm.llm_worker.gpu.step_tables import StepTables
from vitrine_vlm.llm_worker.models.kv_slots import KvScales, read_slots
from vitrine_vlm.llm_worker.models.paged_attention import SequenceSlice


class StepAttention:
    """Attention for all layers of one step, in which the sequences that decode come first."""

    def __init__(
        self,
        sequences: Sequence[SequenceSlice],
        tables: StepTables,
        single_attention: Sequence[Work],
        most_splits: int,
        causal: PackedAttention,
        device: torch.device,
    ) -> None:
        """
        Args:
            tables: are written here.
            single_attention: of the sequences that decode, by layer; captured, so that the host launches no kernels of
                it one by one.
            most_splits: splits of single tokens that this has memory for.
            causal: of the prefill chunks.
        """
        decoding = list(takewhile(lambda sequence: sequence.length == 1, sequences))
        chunks = sequences[len(decoding) :]
        self._num_decoding = len(decoding)
        self._num_tokens = sum(sequence.length for sequence in sequences)
        self._single_attention, self._causal = single_attention, causal
        if decoding:
            tables.write(decoding, most_splits, None)
        if chunks:
            queries, keys = [chunk.length for chunk in chunks], [chunk.context_length for chunk in chunks]
            cumulated = _to_device(torch.tensor([[0, *queries], [0, *keys]], dtype=torch.int32).cumsum(1).int(), device)
            self._bounds = Bounds(cumulated[0], cumulated[1], max(queries), max(keys))
            self._slots_L = _to_device(torch.cat([chunk.slots for chunk in chunks]), device)
        self._has_chunks = bool(chunks)

    def __call__(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        kv_scales: KvScales,
        out_THD: torch.Tensor,
    ) -> None:
        """Writes the attention of the step's tokens to `out_THD`."""
        num_decoding = self._num_decoding
        if num_decoding:
            self._single_attention[layer]()
        if self._has_chunks:
            out_THD[num_decoding : self._num_tokens] = self._causal(
                q_THD[num_decoding : self._num_tokens],
                read_slots(k_cache_SKD, self._slots_L, kv_scales.k, q_THD.dtype),
                read_slots(v_cache_SKD, self._slots_L, kv_scales.v, q_THD.dtype),
                self._bounds,
                scale=q_THD.shape[-1] ** -0.5,
                causal=True,
            )


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to the device without waiting for its running work, as torch would from pageable memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
