"""Rank 0 broadcasts the embeddings it has landed where the other ranks cannot read them themselves."""

from __future__ import annotations

from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.tensor_parallel.group import TorchGroup


def broadcast_embeddings(group: TorchGroup, buffer: InputEmbedBuffer, tokens: tuple[int, int]) -> None:
    """Overwrites embeddings and deepstack rows of tokens [start, stop) on every rank by those of rank 0."""
    start, stop = tokens
    if stop > start:
        for rows_MC in (buffer.embeds_MC, *buffer.deepstack_NMC):
            group.broadcast(rows_MC[start:stop])
