"""Has grammars checked by processes that are ended where one takes too much."""

from __future__ import annotations

import json

from vitrine_vlm.llm_worker.engine import grammar_check
from vitrine_vlm.llm_worker.engine.grammar import Grammar
from vitrine_vlm.llm_worker.engine.grammar_check import MAX_CPU_S, grammar_to_json
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError
from vitrine_vlm.service_runtime.limited_processes import LimitedProcesses, TookTooMuch


class GrammarChecker:
    """Checks grammars in `LimitedProcesses`. Safe on any thread."""

    def __init__(self) -> None:
        self._processes = LimitedProcesses(grammar_check.__name__, MAX_CPU_S)

    def source(self, grammar: Grammar) -> str:
        """Returns the grammar in the language of llguidance; see `grammar_source`.

        Raises:
            GrammarError: it cannot be used, or the check took more time or memory than it may.
        """
        try:
            answer = json.loads(self._processes.ask(grammar_to_json(grammar)))
        except TookTooMuch as error:
            limit = f"more than {MAX_CPU_S:g} s" if error.is_time else "too much memory"
            raise GrammarError(f"the grammar is too complex: its check takes {limit}; send a simpler one") from error
        if "error" in answer:
            raise GrammarError(answer["error"], tuple(answer["path"]))
        source: str = answer["source"]
        return source

    def close(self) -> None:
        """Ends the processes that check nothing; others end with their grammar."""
        self._processes.close()
