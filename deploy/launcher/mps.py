"""CUDA's Multi-Process Service (MPS), for services that share a GPU: their kernels run beside each other, not in turns.

What it gains is in docs/performance.md. Source: NVIDIA's "Multi-Process Service", https://docs.nvidia.com/deploy/mps/.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from vitrine_vlm.service_runtime.child_process import Child

_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_START_TIMEOUT_S, _STOP_GRACE_S = 10.0, 5.0
_POLL_INTERVAL_S = 0.05
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Mps:
    """A daemon that takes clients. environment: the variables by which a program becomes one."""

    daemon: Child
    environment: dict[str, str]

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls) -> AsyncIterator[Mps | None]:
        """Runs a daemon for the GPUs of this machine inside the context; clients must end before it does.

        It is None on a machine that has no MPS, and where the environment names a daemon already, whose clients the
        services are then. A line on stderr says so if the daemon does not start.
        """
        control = shutil.which(_CONTROL)
        if control is None or _PIPES in os.environ:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="vitrine-mps-") as folder:
            environment = {_PIPES: folder, _LOGS: folder}
            # With CUDA_VISIBLE_DEVICES the daemon would renumber the GPUs for its clients, which have it themselves.
            command = ["/usr/bin/env", "-u", "CUDA_VISIBLE_DEVICES", control, "-f"]
            lines = deque[str](maxlen=_SHOWN_LINES)
            daemon = await Child.start_program("mps", command, environment, lines.append)
            try:
                if await _is_active(control, environment):
                    yield cls(daemon, environment)
                    return
            finally:
                await daemon.stop(_STOP_GRACE_S)
        why = "\n".join([f"{_CONTROL} had no server after {_START_TIMEOUT_S:g} s", *lines])
        print(f"vitrine: services take turns on the GPU: {why}", file=sys.stderr, flush=True)
        yield None


async def _is_active(control: str, environment: Mapping[str, str]) -> bool:
    """Whether the daemon has a server within the time limit, which it starts for its first client, or if asked to."""
    asked = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                asked = asked or await _answer(control, f"start_server -uid {os.getuid()}", environment) is not None
                for pid in (await _answer(control, "get_server_list", environment) or "").split():
                    if await _answer(control, f"get_server_status {pid}", environment) == "ACTIVE":
                        return True
                await asyncio.sleep(_POLL_INTERVAL_S)
    return False


async def _answer(control: str, command: str, environment: Mapping[str, str]) -> str | None:
    """Returns what the daemon answers; None if it cannot be reached."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        control, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        output, _ = await process.communicate(f"{command}\n".encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace").strip() if process.returncode == 0 else None
