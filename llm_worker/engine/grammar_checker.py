"""Has grammars checked by processes that are ended where one takes too much."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

from vitrine_vlm.llm_worker.engine import grammar_check
from vitrine_vlm.llm_worker.engine.grammar import Grammar
from vitrine_vlm.llm_worker.engine.grammar_check import MAX_CPU_S, grammar_to_json
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError


class GrammarChecker:
    """As many processes as threads call it at once; they are started when first needed. Safe on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[str]] = []

    def source(self, grammar: Grammar) -> str:
        """Returns the grammar in the language of llguidance; see `grammar_source`.

        Raises:
            GrammarError: it cannot be used, or the check took more time or memory than it may.
        """
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = _start()
        line = _ask(process, grammar_to_json(grammar))
        if not line:
            raise GrammarError(f"the grammar is too complex: {_reason(process)}; send a simpler one")
        with self._lock:
            self._idle.append(process)
        answer = json.loads(line)
        if "error" in answer:
            raise GrammarError(answer["error"], tuple(answer["path"]))
        source: str = answer["source"]
        return source

    def close(self) -> None:
        """Ends the processes that check nothing; others end with their grammar."""
        with self._lock:
            processes, self._idle = self._idle, []
        for process in processes:
            process.communicate()  # closes its stdin, at whose end it ends


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", grammar_check.__name__]
    # What llguidance writes to stderr in the middle of a refused grammar is about its own insides.
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


def _reason(process: subprocess.Popen[str]) -> str:
    process.communicate()
    if process.returncode == -signal.SIGPROF:
        return f"its check takes more than {MAX_CPU_S:g} s"
    return "its check takes too much memory"
