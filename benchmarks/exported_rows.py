"""Rows in the CUDA IPC pool of another process, leased as by an encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrine_vlm.embedding_transport.pools.cuda_ipc_pool import CudaIpcMapping, CudaIpcPool
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.receiving.received_rows import LeasedRows
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import ItemTimings

_LEASE_ID = 1


@contextmanager
def exported_rows(gpu: int, num_tokens: int, row_width: int) -> Iterator[LeasedRows]:
    """Yields random bfloat16 rows in a pool on this GPU, mapped by this process."""
    command = [sys.executable, "-m", __name__, str(gpu), str(num_tokens), str(row_width)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        exported = json.loads(process.stdout.readline())
        handle = bytes.fromhex(exported["handle"])
        mapping = CudaIpcMapping(handle, exported["mapped_nbytes"], exported["gpu_uuid"], torch.device("cuda", 0))
        lease = encoder_pb2.Lease(lease_id=_LEASE_ID, **exported["lease"])
        rows_TW = mapping.rows(lease.offset, (num_tokens, row_width), torch.bfloat16)
        yield LeasedRows(num_tokens, ItemTimings(), mapping, lease, rows_TW, lambda lease_id: None)
    finally:
        process.stdin.close()  # ends the process
        process.wait()


def _export(gpu: int, num_tokens: int, row_width: int) -> None:
    device = torch.device("cuda", gpu)
    rows_TW = torch.randn((num_tokens, row_width), device=device).bfloat16()
    torch.cuda.synchronize(device)
    pool = CudaIpcPool(device, 2 * rows_TW.nbytes)
    block = pool.allocate(rows_TW.nbytes, _LEASE_ID)
    assert block is not None
    pool.write(block, TensorSource(rows_TW))
    lease = {"offset": block.offset, "nbytes": block.nbytes, "generation": block.generation}
    exported = {
        "handle": pool.handle.hex(),
        "mapped_nbytes": pool.mapped_nbytes,
        "gpu_uuid": pool.gpu_uuid,
        "lease": lease,
    }
    print(json.dumps(exported), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _export(*map(int, sys.argv[1:]))
