"""Has templates of requests rendered by processes that are ended where one takes too much."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

from vitrine_vlm.errors import BadRequest

# The module imports transformers, which takes a while: only the process does.
_MODULE = "vitrine_vlm.llm_worker.prompt.template_process"


class TemplateRenderer:
    """As many processes as threads call it at once; they are started when first needed. Safe on any thread.

    Args:
        cpu_s: CPU time of one template, seconds.
    """

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []
        weakref.finalize(self, _end_all, self._idle)

    def render(self, **arguments: Any) -> str:
        """Returns what transformers' `render_jinja_template` makes of these arguments.

        Raises:
            BadRequest: the template refuses them, or takes more time or memory, or writes more, than it may.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = _start()
        line = _ask(process, json.dumps(arguments | {"cpu_s": self._cpu_s}))
        if not line:
            process.communicate()
            too_long = process.returncode == -signal.SIGPROF
            limit = f"more than {self._cpu_s:g} s" if too_long else "too much memory"
            raise BadRequest(f"chat_template: it takes {limit}: send a simpler one", "chat_template")
        with self._lock:
            self._idle.append(process)
        answer = json.loads(line)
        if "error" in answer:
            raise BadRequest(answer["error"], "chat_template")
        text: str = answer["text"]
        return text


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", _MODULE]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    )


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """Returns the process's answer; an empty string where it has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


def _end_all(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.communicate()  # closes its stdin, at whose end it ends
