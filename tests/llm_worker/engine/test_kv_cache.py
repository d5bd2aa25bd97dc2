"""Blocks are handed out whole, never twice, and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedding_transport.checkpoint import open_checkpoint
from llm_worker.engine.kv_cache import BlockTable, KvCache
from llm_worker.models.config import text_config


@pytest.fixture
def cache(qwen3_vl_folder: Path) -> KvCache:
    config = text_config(open_checkpoint(str(qwen3_vl_folder)))
    return KvCache(config, num_blocks=6, block_size=4, device=torch.device("cpu"), dtype=torch.float32)


def test_slots_are_those_of_the_blocks_and_nobody_elses(cache: KvCache) -> None:
    one, other = BlockTable(), BlockTable()
    assert cache.grow(one, 5) and cache.grow(other, 8) and cache.grow(one, 13)
    assert (len(one.blocks), len(other.blocks), cache.num_free) == (4, 2, 0)
    assert one.slots.tolist() == [block * 4 + offset for block in one.blocks for offset in range(4)]
    assert sorted([*one.slots.tolist(), *other.slots.tolist()]) == list(range(24))
    assert cache.layers.shape[2] == 24


def test_growing_keeps_what_is_there(cache: KvCache) -> None:
    table = BlockTable()
    cache.grow(table, 6)
    before = table.slots[:6].tolist()
    assert cache.grow(table, 3) and len(table.blocks) == 2
    assert cache.grow(table, 20)
    assert table.slots[:6].tolist() == before


def test_all_or_nothing(cache: KvCache) -> None:
    table = BlockTable()
    assert cache.grow(table, 4)
    assert not cache.grow(table, 25)
    assert (len(table.blocks), cache.num_free) == (1, 5)
    cache.free(table)
    assert (table.blocks, len(table.slots), cache.num_free) == ([], 0, 6)
    assert cache.grow(table, 24)
