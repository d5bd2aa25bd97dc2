"""The pool's allocator against a model, its headers, its file, and what a reader must refuse."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vitrine_vlm.embedding_transport.pools.pool import HEADER_NBYTES, PROBE_NBYTES, FreeList
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmMapping, ShmPool
from vitrine_vlm.errors import LeaseExpired, TransportUnavailable

POOL_NBYTES = 64 * 1024
OWNER = """
import sys, time
from pathlib import Path
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmPool
pool = ShmPool(Path(sys.argv[1]), 4096)
print(pool.name, flush=True)
time.sleep(60)
"""


def test_free_list_never_overlaps_and_joins_released_ranges() -> None:
    rng = random.Random(0)
    free_list = FreeList(POOL_NBYTES)
    held: dict[int, int] = {}
    num_refused = 0
    for _ in range(5000):
        if held and rng.random() < 0.5:
            start = rng.choice(list(held))
            free_list.release(start, held.pop(start))
            continue
        nbytes = rng.randint(1, 5000)
        taken = free_list.allocate(nbytes)
        if taken is None:
            num_refused += 1
            continue
        assert taken % 64 == 0 and taken + nbytes <= POOL_NBYTES
        assert all(taken + nbytes <= other or other + length <= taken for other, length in held.items())
        held[taken] = nbytes
    assert num_refused, "the pool was never full: the test proves little"
    for start, nbytes in held.items():
        free_list.release(start, nbytes)
    assert free_list.free_nbytes == POOL_NBYTES
    assert free_list.allocate(POOL_NBYTES) == 0


def test_rows_are_read_as_written_until_the_block_is_released(tmp_path: Path) -> None:
    pool = ShmPool(tmp_path, POOL_NBYTES)
    mapping = ShmMapping(tmp_path, pool.name, pool.mapped_nbytes)
    assert mapping.read(0, PROBE_NBYTES) == pool.nonce
    block = pool.allocate(5 * 8 * 4, lease_id=7)
    assert block is not None
    rows = torch.randn(5, 8)
    pool.rows(block, (5, 8), torch.float32).copy_(rows)

    mapping.check(block.offset, 7, block.generation, block.nbytes)
    assert torch.equal(mapping.rows(block.offset, (5, 8), torch.float32), rows)
    for lease_id, generation in ((8, block.generation), (7, block.generation + 1)):
        with pytest.raises(LeaseExpired):
            mapping.check(block.offset, lease_id, generation, block.nbytes)

    pool.release(block)
    with pytest.raises(LeaseExpired):
        mapping.check(block.offset, 7, block.generation, block.nbytes)
    again = pool.allocate(5 * 8 * 4, lease_id=7)
    assert again is not None and again.offset == block.offset
    with pytest.raises(LeaseExpired):  # same lease id, same place, another generation
        mapping.check(block.offset, 7, block.generation, block.nbytes)
    pool.close()


def test_a_reader_cannot_change_the_owners_memory(tmp_path: Path) -> None:
    pool = ShmPool(tmp_path, POOL_NBYTES)
    block = pool.allocate(64, lease_id=1)
    assert block is not None
    own = pool.rows(block, (4, 4), torch.float32)
    own.fill_(1)
    ShmMapping(tmp_path, pool.name, pool.mapped_nbytes).rows(block.offset, (4, 4), torch.float32).fill_(2)
    assert torch.equal(own, torch.ones(4, 4))
    pool.close()


def test_readers_refuse_what_does_not_lie_in_the_pool(tmp_path: Path) -> None:
    pool = ShmPool(tmp_path, POOL_NBYTES)
    mapping = ShmMapping(tmp_path, pool.name, pool.mapped_nbytes)
    for offset in (0, 64, pool.mapped_nbytes - 64, 4096 + HEADER_NBYTES + 1, 1 << 60):
        with pytest.raises(TransportUnavailable):
            mapping.rows(offset, (4, 8), torch.float32)
    for offset, nbytes in ((-1, 4), (0, -1), (pool.mapped_nbytes, 1)):
        with pytest.raises(TransportUnavailable):
            mapping.read(offset, nbytes)
    pool.close()


def test_readers_refuse_names_that_are_no_pools(tmp_path: Path) -> None:
    pool = ShmPool(tmp_path / ".", POOL_NBYTES)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / f"vitrine-{'0' * 32}").symlink_to(tmp_path / pool.name)
    for name in (f"../{pool.name}", str(tmp_path / pool.name), "vitrine-1", "passwd", "", f"vitrine-{'0' * 32}"):
        with pytest.raises(TransportUnavailable):
            ShmMapping(inner, name, 4096)
    os.mkfifo(inner / f"vitrine-{'1' * 32}")
    with pytest.raises(TransportUnavailable, match="its file has 0"):  # and does not wait for a writer
        ShmMapping(inner, f"vitrine-{'1' * 32}", 4096)
    with pytest.raises(TransportUnavailable, match="its file has"):
        ShmMapping(tmp_path, pool.name, pool.mapped_nbytes + 1)
    pool.close()
    assert not list(tmp_path.glob("vitrine-*"))


def test_a_folder_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransportUnavailable, match="missing"):
        ShmPool(tmp_path / "missing", POOL_NBYTES)


def test_a_killed_owners_file_is_removed_by_the_next_and_a_live_ones_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    owners = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = [owner.stdout.readline().strip() for owner in owners if owner.stdout]
    owners[0].send_signal(signal.SIGKILL)
    owners[0].wait()
    assert {path.name for path in tmp_path.iterdir()} == set(names)

    pool = ShmPool(tmp_path, POOL_NBYTES)

    assert {path.name for path in tmp_path.iterdir()} == {names[1], pool.name}
    owners[1].kill()
    owners[1].wait()
    pool.close()


def test_files_that_are_no_pools_are_left_alone(tmp_path: Path) -> None:
    names = {"vitrine-notes.txt", "vitrine-", f"vitrine-{'0' * 33}"}
    for name in names:
        (tmp_path / name).touch()
    ShmPool(tmp_path, POOL_NBYTES).close()
    assert {path.name for path in tmp_path.iterdir()} == names


def test_starters_never_remove_each_others_files(tmp_path: Path) -> None:
    """Many pools at once, each looking for stale files while others are being made."""
    with ThreadPoolExecutor(8) as threads:
        pools = list(threads.map(lambda _: ShmPool(tmp_path, 4096), range(400)))
    assert {path.name for path in tmp_path.iterdir()} == {pool.name for pool in pools}
    for pool in pools:
        pool.close()
