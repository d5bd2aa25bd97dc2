"""Blocks are allocated once at a time, and can be allocated again after their release."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.llm_worker.models.paged_attention import BlockTable
from vitrine_vlm.model_loading.checkpoint import open_checkpoint


@pytest.fixture
def cache(qwen3_vl_folder: Path) -> KvCache:
    config = text_config(open_checkpoint(str(qwen3_vl_folder)))
    return KvCache(config, num_blocks=6, block_size=4, device=torch.device("cpu"), dtype=torch.float32)


def test_slots_are_those_of_the_blocks_and_of_no_other_table(cache: KvCache) -> None:
    one, other = BlockTable(), BlockTable()
    assert cache.append_slots(one, 5) and cache.append_slots(other, 8) and cache.append_slots(one, 13)
    assert (len(one.blocks), len(other.blocks), cache.num_free) == (4, 2, 0)
    assert one.slots.tolist() == [block * 4 + offset for block in one.blocks for offset in range(4)]
    assert sorted([*one.slots.tolist(), *other.slots.tolist()]) == list(range(24))
    assert cache.layers.shape[2] == 24


def test_growing_keeps_what_is_there(cache: KvCache) -> None:
    table = BlockTable()
    cache.append_slots(table, 6)
    before = table.slots[:6].tolist()
    assert cache.append_slots(table, 3) and len(table.blocks) == 2
    assert cache.append_slots(table, 20)
    assert table.slots[:6].tolist() == before


def test_all_or_nothing(cache: KvCache) -> None:
    table = BlockTable()
    assert cache.append_slots(table, 4)
    assert not cache.append_slots(table, 25)
    assert (len(table.blocks), cache.num_free) == (1, 5)
    cache.release(table)
    assert (table.blocks, len(table.slots), cache.num_free) == ([], 0, 6)
    assert cache.append_slots(table, 24)


def test_blocks_are_shared_and_kept_until_they_are_needed(cache: KvCache) -> None:
    one, other = BlockTable(), BlockTable()
    cache.append_slots(one, 12)
    for index, name in enumerate((b"a", b"b", b"c")):
        cache.register_hash(one, index, name)
    assert cache.match_prefix([b"a", b"b", b"x", b"c"]) == one.blocks[:2]
    assert cache.allocate(other, cache.match_prefix([b"a", b"b"]), 16)
    assert other.blocks[:2] == one.blocks[:2] and cache.num_free == 1
    assert other.slots[:8].tolist() == one.slots[:8].tolist()
    held = list(other.blocks)
    cache.release(one)
    assert (cache.num_free, cache.num_cached_free) == (2, 1)  # the others are held by `other`
    cache.release(other)
    assert (cache.num_free, cache.num_cached_free) == (6, 3)
    # Empty ones are allocated first, then the last ones of the table that was released least recently.
    table = BlockTable()
    assert cache.append_slots(table, 16)
    assert (cache.num_evicted, cache.match_prefix([b"a", b"b", b"c"])) == (1, held[:2])
    assert not cache.allocate(other, cache.match_prefix([b"a"]), 16)
    assert not cache.allocate(other, cache.match_prefix([b"a"]), 8, num_reserved=1)
    assert (other.blocks, cache.num_cached_free) == ([], 2)
    assert cache.allocate(other, cache.match_prefix([b"a"]), 8)
    assert cache.num_evicted == 2 and cache.match_prefix([b"a", b"b"]) == other.blocks[:1]


def test_an_equal_block_is_kept_once(cache: KvCache) -> None:
    one, other = BlockTable(), BlockTable()
    cache.append_slots(one, 4)
    cache.append_slots(other, 4)
    for table in (one, other):
        cache.register_hash(table, 0, b"a")
    assert cache.match_prefix([b"a"]) == one.blocks
    cache.release(other)
    assert cache.match_prefix([b"a"]) == one.blocks
    assert cache.num_cached_free == 0


def test_any_sequence_of_events_loses_no_block_and_shares_none_that_is_written(cache: KvCache) -> None:
    rng = random.Random(0)
    tables: list[BlockTable] = []
    names: dict[int, bytes] = {}  # of blocks in use, kept by this test
    for step in range(3000):
        if tables and rng.random() < 0.4:
            cache.release(tables.pop(rng.randrange(len(tables))))
        else:
            table = BlockTable()
            wanted = [bytes([rng.randrange(3)]) + bytes([depth]) for depth in range(rng.randrange(4))]
            matched = cache.match_prefix(wanted)
            assert [names[block] for block in matched] == wanted[: len(matched)]
            if cache.allocate(table, matched, 4 * (len(wanted) + 1)):
                for fresh in table.blocks[len(matched) :]:
                    assert not any(fresh in other.blocks for other in tables)
                    names.pop(fresh, None)
                for index in range(len(matched), len(wanted)):
                    names[table.blocks[index]] = wanted[index]
                    cache.register_hash(table, index, wanted[index])
                tables.append(table)
        held = {block for table in tables for block in table.blocks}
        assert cache.num_free == cache.num_blocks - len(held), step
