"""One container: a process with a root, volumes and process ids of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster.images import HOST_FOLDERS
from tests.deploy.proc import children_of

_INIT = Path(__file__).parent / "container_init.py"
# Ends with this process, however that ends; the container's process 1, and with it all others, end with `unshare`.
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL")


@dataclass(frozen=True)
class Mount:
    """A volume in a container. source: a folder or file of this machine. path: where the container sees it."""

    source: str
    path: str
    read_only: bool


@dataclass(frozen=True)
class ContainerSpec:
    """command: with its arguments. env: all of the environment. read_only: whether the root file system is."""

    command: Sequence[str]
    env: dict[str, str]
    mounts: Sequence[Mount]
    read_only: bool


class Container:
    """A started container. Create it with `start`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, spec: ContainerSpec, folder: Path, pods_folder: Path, log: Path) -> Container:
        """
        Args:
            folder: empty, for the root. pods_folder: what has the sources of all mounts in it.
            log: output is appended to it.
        """
        details = {
            "folder": str(folder),
            "pods_folder": str(pods_folder),
            "host_folders": HOST_FOLDERS,
            "command": list(spec.command),
            "env": spec.env,
            "mounts": [asdict(mount) for mount in spec.mounts],
            "read_only": spec.read_only,
        }
        file = folder.with_suffix(".json")
        file.write_text(json.dumps(details))
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *_UNSHARE, sys.executable, "-I", str(_INIT), str(file),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        return cls(process)

    async def wait(self) -> int:
        """Returns the exit status, or 128 plus the signal's number."""
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    def terminate(self) -> None:
        """SIGTERM to process 1."""
        if self._process.returncode is None:
            for pid in children_of(self._process.pid):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all processes."""
        if self._process.returncode is None:
            self._process.kill()
