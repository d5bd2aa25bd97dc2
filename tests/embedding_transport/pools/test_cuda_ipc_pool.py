"""CUDA IPC between real processes on real GPUs: probe, rows, leases that end, namespaces, another GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitrine_vlm.embedding_transport.pools.pool import HEADER_NBYTES, PROBE_NBYTES
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.errors import TransportUnavailable

pytestmark = pytest.mark.gpu

SHAPE = (37, 512)
POOL_NBYTES = 64 << 20
# Maps the pool that the parent describes, one line a block; answers with what it reads of it.
READER = """
import sys, torch
from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcMapping
from vitrine_vlm.errors import LeaseExpired
from vitrine_vlm.embedding_transport.receiving.received_rows import copy_rows
handle, nbytes, uuid, device = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
mapping = CudaIpcMapping(handle, nbytes, uuid, torch.device(device))
print(mapping.read(0, 32).hex(), flush=True)
for line in sys.stdin:
    offset, lease_id, generation, length, tokens, width = map(int, line.split())
    rows = mapping.rows(offset, (tokens, width), torch.bfloat16)
    landed = torch.zeros((tokens, width), dtype=torch.bfloat16, device=device)
    deepstack = torch.zeros((1, tokens, width // 2), dtype=torch.bfloat16, device=device)
    try:
        copy_rows(rows, landed[:, : width // 2], deepstack, 0)
        queued = mapping.queue_header(offset)
        torch.cuda.synchronize(device)
        for seen in (queued, None):
            mapping.check(offset, lease_id, generation, length, seen)
        print((landed.float().sum() + deepstack.float().sum()).item(), flush=True)
    except LeaseExpired:
        print("expired", flush=True)
"""


def reader(pool: object, *, device: str = "cuda:0", wrapper: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    arguments = [pool.handle.hex(), str(pool.mapped_nbytes), pool.gpu_uuid, device]  # type: ignore[attr-defined]
    return subprocess.Popen(
        [*wrapper, sys.executable, "-c", READER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
    )


def ask(process: subprocess.Popen[str], block: object, lease_id: int) -> str:
    assert process.stdin is not None and process.stdout is not None
    numbers = (block.offset, lease_id, block.generation, block.nbytes, *SHAPE)  # type: ignore[attr-defined]
    print(*numbers, file=process.stdin, flush=True)
    return process.stdout.readline().strip()


def rows(value: float) -> torch.Tensor:
    made = torch.full(SHAPE, value, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()  # a pool wants rows that are complete
    return made


@pytest.fixture
def pool() -> object:
    from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcPool

    return CudaIpcPool(torch.device("cuda", 0), POOL_NBYTES)


WRAPPERS = {
    "same namespaces": (),
    "own PID, IPC, network and UTS namespaces": (
        "unshare", "--pid", "--fork", "--mount-proc", "--ipc", "--net", "--uts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_rows_arrive_and_the_release_of_a_block_is_noticed(pool: object, wrapper: tuple[str, ...]) -> None:
    if wrapper and (shutil.which("unshare") is None or os.geteuid() != 0):
        pytest.skip("making namespaces needs unshare and root")
    with reader(pool, wrapper=wrapper) as process:
        assert process.stdout is not None
        nonce = process.stdout.readline().strip()
        assert nonce == pool.nonce.hex()  # type: ignore[attr-defined]
        assert len(nonce) == 2 * PROBE_NBYTES
        nbytes = rows(0).nbytes
        first = pool.allocate(nbytes, 7)  # type: ignore[attr-defined]
        pool.write(first, TensorSource(rows(2)))  # type: ignore[attr-defined]
        assert float(ask(process, first, 7)) == 2 * SHAPE[0] * SHAPE[1]
        assert ask(process, first, 8) == "expired"
        pool.release(first)  # type: ignore[attr-defined]
        assert ask(process, first, 7) == "expired"
        second = pool.allocate(nbytes, 9)  # type: ignore[attr-defined]
        pool.write(second, TensorSource(rows(3)))  # type: ignore[attr-defined]
        assert second.offset == first.offset
        assert ask(process, first, 7) == "expired"
        assert float(ask(process, second, 9)) == 3 * SHAPE[0] * SHAPE[1]
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rows_arrive_on_another_gpu(pool: object) -> None:
    with reader(pool, device="cuda:1") as process:
        assert process.stdout is not None
        process.stdout.readline()
        block = pool.allocate(rows(0).nbytes, 1)  # type: ignore[attr-defined]
        pool.write(block, TensorSource(rows(5)))  # type: ignore[attr-defined]
        assert float(ask(process, block, 1)) == 5 * SHAPE[0] * SHAPE[1]
        assert process.stdin is not None
        process.stdin.close()


def test_rows_written_behind_their_computation_arrive(pool: object) -> None:
    with reader(pool) as process:
        assert process.stdout is not None
        process.stdout.readline()
        nbytes = rows(0).nbytes
        torch.cuda._sleep(1_000_000_000)  # about half a second, on the stream that then makes the rows
        made = torch.full(SHAPE, 4, dtype=torch.bfloat16, device="cuda")
        block = pool.allocate(nbytes, 11)  # type: ignore[attr-defined]
        assert pool.supports_device(made.device)  # type: ignore[attr-defined]
        assert not pool.supports_device(torch.device("cpu"))  # type: ignore[attr-defined]
        pool.write_async(block, made)  # type: ignore[attr-defined]
        assert not torch.cuda.current_stream().query(), "taking a block or queueing the copy waited for the rows"
        torch.cuda.current_stream().synchronize()
        assert float(ask(process, block, 11)) == 4 * SHAPE[0] * SHAPE[1]
        assert process.stdin is not None
        process.stdin.close()


def test_headers_are_right_however_many_there_were(pool: object) -> None:
    from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import _NUM_STAGED

    for lease_id in range(_NUM_STAGED):  # two headers each
        block = pool.allocate(64, lease_id)  # type: ignore[attr-defined]
        torch.cuda.synchronize()
        header = pool._memory[block.offset - HEADER_NBYTES : block.offset].cpu()  # type: ignore[attr-defined]
        assert header.view(torch.int64).tolist()[1:4] == [lease_id, block.generation, 64]
        pool.release(block)  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    assert not pool._memory[block.offset - HEADER_NBYTES : block.offset].any()  # type: ignore[attr-defined]


def test_a_write_does_not_wait_for_the_tower(pool: object) -> None:
    done = rows(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of work on the default stream
    behind = torch.cuda.current_stream().record_event()
    block = pool.allocate(done.nbytes, 1)  # type: ignore[attr-defined]
    pool.write(block, TensorSource(done))  # type: ignore[attr-defined]
    assert not behind.query(), "the write was ordered behind work that has nothing to do with it"
    torch.cuda.synchronize()


def test_false_sizes_and_handles_are_refused(pool: object) -> None:
    from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcMapping

    handle, nbytes, uuid = pool.handle, pool.mapped_nbytes, pool.gpu_uuid  # type: ignore[attr-defined]
    device = torch.device("cuda", 0)
    with pytest.raises(TransportUnavailable, match="not visible"):
        CudaIpcMapping(handle, nbytes, "GPU-0", device)
    with pytest.raises(TransportUnavailable, match="64"):
        CudaIpcMapping(handle[:60], nbytes, uuid, device)
    with pytest.raises(TransportUnavailable):
        CudaIpcMapping(bytes(64), nbytes, uuid, device)
    with pytest.raises(TransportUnavailable):  # a process cannot open what it exports itself
        CudaIpcMapping(handle, nbytes, uuid, device)


def test_a_length_that_is_too_large_is_refused(pool: object) -> None:
    script = READER.split("mapping =")[0] + "CudaIpcMapping(handle, nbytes * 1000, uuid, torch.device(device))"
    arguments = [pool.handle.hex(), str(pool.mapped_nbytes), pool.gpu_uuid, "cuda:0"]  # type: ignore[attr-defined]
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
    )
    assert "TransportUnavailable: a pool said to have" in ran.stderr, ran.stderr
