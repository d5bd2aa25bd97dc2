"""A process in which a client of the API is called, with the versions of its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any


class ClientError(Exception):
    """What a client has raised.

    classes: names of the exception's class and its bases, as "package.Class". others: status_code, code, param, type.
    """

    def __init__(self, error: dict[str, Any], log: str) -> None:
        self.classes: list[str] = error.pop("classes")
        self.message: str = error.pop("message")
        self.others = error
        super().__init__(f"{self.classes[0]}: {self.message}\n{error}\n{log}")


class ClientProcess:
    """Calls functions of a module in another interpreter, one at a time; see `callers/run_calls.py`."""

    def __init__(self, command: Sequence[str | Path], folder: Path) -> None:
        """
        Args:
            command: the interpreter and what it runs.
            folder: the working directory.
        """
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `close` closes it
        # Of the machine's variables only those that a client needs: none that names a server, a proxy or a key.
        names = ("PATH", "HOME", "LANG", "TMPDIR")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=folder,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )

    def call(self, function: str, **arguments: Any) -> Any:
        """Returns what the function returns.

        Raises:
            ClientError: what the function has raised.
        """
        print(json.dumps({"function": function, "arguments": arguments}), file=self._stdin, flush=True)
        line = self._stdout.readline()
        if not line:
            raise RuntimeError(f"the client's process has ended with {self._process.wait()}:\n{self._read_log()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], self._read_log())
        return answer["value"]

    def close(self) -> None:
        self._stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]
