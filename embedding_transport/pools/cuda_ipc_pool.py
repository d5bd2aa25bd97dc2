"""The exported pool in GPU memory, mapped by other processes of the host through CUDA IPC, without a copy to the host.

The pool is one plain cudaMalloc allocation, which exists as long as its process; virtual-memory allocations cannot be
exported. The raw handle works across PID, IPC, network and mount namespaces, as long as the two processes
have different PIDs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitrine_vlm.embedding_transport.pools.pool import (
    HEADER_NBYTES,
    PAGE_NBYTES,
    Block,
    ExportPool,
    PoolMapping,
    PoolSource,
)
from vitrine_vlm.embedding_transport.pools.row_source import RowSource
from vitrine_vlm.errors import TransportUnavailable

_HANDLE_NBYTES = 64
# Headers that may be in flight to the GPU at once; the next one then waits for them.
_NUM_STAGED = 1024


class CudaIpcPool(ExportPool):
    """The owner's side, on one GPU. `handle` is its cudaIpcMemHandle_t, 64 bytes.

    Raises:
        TransportUnavailable: cuda-bindings is not installed, or the GPU has no room.
    """

    transport = "cuda_ipc"

    def __init__(self, device: torch.device, nbytes: int) -> None:
        super().__init__(nbytes)
        self.gpu_uuid = gpu_uuid(device)
        with torch.cuda.device(device):
            runtime = _runtime()
            pointer = _checked(runtime.cudaMalloc(self.mapped_nbytes), f"a pool of {nbytes} bytes")
            self.handle = bytes(_checked(runtime.cudaIpcGetMemHandle(pointer), "exporting it").reserved)
            self._memory = _as_tensor(_DeviceMemory(int(pointer), self.mapped_nbytes), device)
            # A separate stream: copies must not wait for the work on the default stream. Its priority is high, as peers
            # wait for these short copies, which run beside large kernels.
            self._stream = torch.cuda.Stream(priority=-1)
        self._staged = torch.zeros((_NUM_STAGED, HEADER_NBYTES), dtype=torch.uint8, pin_memory=True)
        self._next_staged = 0
        self._write_header(0, self.nonce)
        self._stream.synchronize()

    def write(self, block: Block, rows: RowSource) -> None:
        with torch.cuda.stream(self._stream):
            rows.copy_to(self._rows(block, rows.shape, rows.dtype))
            done = self._stream.record_event()
        done.synchronize()

    def supports_device(self, device: torch.device) -> bool:
        return device == self._memory.device

    def write_async(self, block: Block, rows_TW: torch.Tensor) -> None:
        # The header was written, and the last one cleared, on the pool's own stream, which is never blocked for long.
        torch.cuda.current_stream(rows_TW.device).wait_stream(self._stream)
        num_tokens, width = rows_TW.shape
        self._rows(block, (num_tokens, width), rows_TW.dtype).copy_(rows_TW, non_blocking=True)

    def _rows(self, block: Block, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        assert shape[0] * shape[1] * dtype.itemsize == block.nbytes, "rows do not fill their block"
        return self._memory[block.offset : block.offset + block.nbytes].view(dtype).view(shape)

    def close(self) -> None:
        """Does nothing: the memory is freed with the process, and a peer may still read it."""

    def _write_header(self, offset: int, header: bytes) -> None:
        if self._next_staged == _NUM_STAGED:
            self._stream.synchronize()  # all copies out of the staging memory are done, so it can be used again
            self._next_staged = 0
        staged = self._staged[self._next_staged, : len(header)]
        self._next_staged += 1
        staged.copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        with torch.cuda.stream(self._stream):
            self._memory[offset : offset + len(header)].copy_(staged, non_blocking=True)


class CudaIpcMapping(PoolMapping):
    """The readers' side, for one thread at a time. The pool is unmapped once neither this nor a view of it is left.

    The reader's GPU reads the pool, whichever GPU holds it, and torch treats it as memory of the reader's GPU: a kernel
    of the reader on the owner's GPU, even a short copy, would wait for the time slice of the owner's process.

    Args:
        handle: the handle of the pool.
        nbytes: the size of the pool, as its owner states it.
        uuid: the GPU that holds the pool.
        device: the GPU that reads the pool.

    Raises:
        TransportUnavailable: the exporter's GPU is not visible to this process, both processes have the same PID, or
            the handle is not valid.
    """

    def __init__(self, handle: bytes, nbytes: int, uuid: str, device: torch.device) -> None:
        super().__init__(nbytes)
        self._handle, self._uuid = handle, uuid
        if len(handle) != _HANDLE_NBYTES:
            raise TransportUnavailable(f"a CUDA IPC handle of {len(handle)} bytes, expected {_HANDLE_NBYTES}")
        _check_visible(uuid)
        runtime = _runtime()
        raw = runtime.cudaIpcMemHandle_t()
        raw.reserved = handle
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # creates the context
            opened = runtime.cudaIpcOpenMemHandle(raw, runtime.cudaIpcMemLazyEnablePeerAccess)
            pointer = int(_checked(opened, f"opening the pool of GPU {uuid}"))
            mapped = _MappedMemory(pointer, nbytes, runtime.cudaIpcCloseMemHandle)
            size = _checked(_driver().cuMemGetAddressRange(pointer), "measuring the pool")
            if int(size) < nbytes:
                raise TransportUnavailable(f"a pool said to have {nbytes} bytes has {int(size)}")
            self._memory = _as_tensor(mapped, device)
            self._staged = torch.zeros(PAGE_NBYTES, dtype=torch.uint8, pin_memory=True)
            # A separate stream: reads must not wait for steps of the model.
            self._stream = torch.cuda.Stream()

    def source(self) -> PoolSource:
        return {"handle": self._handle.hex(), "nbytes": self.nbytes, "uuid": self._uuid}

    def queue_header(self, offset: int) -> torch.Tensor:
        header = torch.empty(HEADER_NBYTES, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.device(self._memory.device):
            header.copy_(self._memory[offset - HEADER_NBYTES : offset], non_blocking=True)
        return header

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        if nbytes > PAGE_NBYTES:
            raise TransportUnavailable(f"{nbytes} bytes at once of a pool in GPU memory: at most {PAGE_NBYTES}")
        with torch.cuda.stream(self._stream):
            self._staged[:nbytes].copy_(self._memory[offset : offset + nbytes], non_blocking=True)
        self._stream.synchronize()
        return self._staged[:nbytes].numpy().tobytes()

    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = shape[0] * shape[1] * dtype.itemsize
        return self._memory[offset : offset + nbytes].view(dtype).view(shape)


class _DeviceMemory:
    """Bytes on a GPU for torch to wrap; torch keeps this object as long as any view exists."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.pointer = pointer
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class _MappedMemory(_DeviceMemory):
    def __init__(self, pointer: int, nbytes: int, close: Callable[[int], object]) -> None:
        super().__init__(pointer, nbytes)
        self._close = close

    def __del__(self) -> None:
        # An open mapping would pin the exporter's memory even after the exporter has ended.
        self._close(self.pointer)


def gpu_uuid(device: torch.device | int) -> str:
    """Returns the GPU's UUID ("GPU-..."), which is the same in all processes, unlike its index."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def gpu_uuids(device: torch.device) -> tuple[str, ...]:
    """Returns the UUID of the GPU ("GPU-..."), the same in all processes; nothing for the CPU."""
    if device.type == "cpu":
        return ()
    return (gpu_uuid(device),)


def _check_visible(uuid: str) -> None:
    visible = [gpu_uuid(index) for index in range(torch.cuda.device_count())]
    if uuid not in visible:
        raise TransportUnavailable(f"the exporter's GPU {uuid} is not visible here; visible are {visible}")


def _as_tensor(memory: _DeviceMemory, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(memory, device=device)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise TransportUnavailable(f"CUDA IPC needs the package cuda-bindings: {error}") from error
    return runtime


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """Returns the last value of a CUDA call's result.

    Raises:
        TransportUnavailable: the call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise TransportUnavailable(f"{what} failed: {error.name} ({int(error)})")
    return values[-1]
